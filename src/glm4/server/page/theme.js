// Runs before the page is drawn, so that it never shows in the wrong colours first.
document.documentElement.dataset.theme = localStorage.getItem("glm4.theme") ?? "auto";
