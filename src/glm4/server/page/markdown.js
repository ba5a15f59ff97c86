// Markdown as language models write it, to DOM nodes. Nothing here parses HTML: a tag in the text stays text.
//
// It follows CommonMark with GFM's tables, and departs from it where answers read better: a newline breaks the line,
// `**重点：**内容` is bold (CommonMark's flanking rules refuse that), formulas keep their source, and there are no
// reference links, no indented code and no HTML. Every search is bounded, so hostile text costs linear time.

import { isBlank, MAX_DEPTH, parse } from "./blocks.js";
import { copyText } from "./copy.js";
import { el } from "./dom.js";
import { say } from "./words.js";

// ---- blocks to nodes ---------------------------------------------------------------------------------------------

function build(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block);
    case "math":
      return el("div", { class: "math" }, block.text);
    case "rule":
      return el("hr");
    case "heading":
      return withInline(el(`h${block.level}`), block.text);
    case "quote":
      return el("blockquote", {}, ...block.blocks.map(build));
    case "list":
      return list(block);
    case "table":
      return table(block);
    default:
      return withInline(el("p"), block.text);
  }
}

function codeBlock({ language, text }) {
  const code = el("code", {}, text);
  const copy = el("button", { type: "button", click: () => copyText(copy, code.textContent) }, say("copy"));
  const caption = el("figcaption", {}, el("span", {}, language), copy);
  return el("figure", { class: "code" }, caption, el("pre", { tabindex: "0" }, code));
}

function list({ ordered, start, loose, items }) {
  const node = ordered ? el("ol", { start: start === 1 ? undefined : start }) : el("ul");
  for (const blocks of items) {
    const item = el("li");
    for (const block of blocks) {
      if (block.kind === "paragraph" && !loose) withInline(item, block.text);
      else item.append(build(block));
    }
    node.append(item);
  }
  return node;
}

function table({ align, head, rows }) {
  const row = (tag, texts) =>
    el("tr", {}, ...head.map((_, at) => withInline(el(tag, { class: align[at] }), texts[at] ?? "")));
  const body = rows.map((texts) => row("td", texts));
  const node = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...body));
  return el("div", { class: "table", tabindex: "0" }, node);
}

// ---- inline ------------------------------------------------------------------------------------------------------

const SPECIAL = /\\|`+|\*+|_+|~~|!?\[|<|&|\$|\n|https?:\/\//g;
const DESTINATION =
  /\(\s{0,9}(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s{1,9}(?:"[^"]*"|'[^']*'))?\s{0,9}\)/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const LINE_BREAK = /<br\s{0,3}\/?>/iy;
const BARE_URL = /https?:\/\/[^\s<>"'`*，。；：！？、（）【】《》「」“”]+/y;
const ENTITY = /&(amp|lt|gt|quot|apos|nbsp);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const FORMULA = /\$\$[^$]+\$\$|\$(?!\s)[^$\n]+(?<!\s)\$(?!\d)/y;
const WORD = /[\p{L}\p{N}_]/u;
const MAX_LABEL = 500;

function withInline(parent, text, depth = 0) {
  if (depth >= MAX_DEPTH) {
    parent.append(text);
    return parent;
  }
  const reader = { text, depth, spans: codeSpans(text), unclosed: new Set() };
  let plain = 0;
  SPECIAL.lastIndex = 0;
  for (let found; (found = SPECIAL.exec(text)); ) {
    const at = found.index;
    const [node, to] = readInline(reader, at, found[0]) ?? [undefined, at + found[0].length];
    if (node !== undefined) {
      if (at > plain) parent.append(text.slice(plain, at));
      parent.append(node);
      plain = to;
    }
    SPECIAL.lastIndex = to; // nested calls have moved it
  }
  if (plain < text.length) parent.append(text.slice(plain));
  return parent;
}

/** [node, where it ends] for what begins at `at`, or nothing where that is just text. */
function readInline(reader, at, token) {
  const { text } = reader;
  switch (token[0]) {
    case "\\":
      return readEscape(reader, at);
    case "`":
      return readCode(reader, at, token.length);
    case "\n":
      return [el("br"), at + 1];
    case "*":
    case "_":
    case "~":
      return readEmphasis(reader, at, token);
    case "!":
    case "[":
      return readLink(reader, at, token);
    case "<": {
      if (match(LINE_BREAK, text, at)) return [el("br"), LINE_BREAK.lastIndex];
      const auto = match(AUTOLINK, text, at);
      const node = auto && link(auto[1], auto[1].replace(/^mailto:/, ""));
      return node && [node, at + auto[0].length];
    }
    case "&": {
      const entity = match(ENTITY, text, at);
      return entity && [ENTITIES[entity[1]], at + entity[0].length];
    }
    case "$": {
      const formula = match(FORMULA, text, at);
      return formula && [el("span", { class: "math" }, formula[0]), at + formula[0].length];
    }
    default: {
      let [url] = match(BARE_URL, text, at) ?? [""];
      url = url.replace(/[.,;:!?]{1,9}$/, "");
      if (url.endsWith(")") && !url.includes("(")) url = url.slice(0, -1);
      const node = link(url, url);
      return node && [node, at + url.length];
    }
  }
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function readEscape({ text, unclosed }, at) {
  const next = text[at + 1];
  const close = { "(": "\\)", "[": "\\]" }[next];
  if (close && !unclosed.has(close)) {
    const end = text.indexOf(close, at);
    if (end > 0) return [el("span", { class: "math" }, text.slice(at, end + 2)), end + 2];
    unclosed.add(close);
  }
  if (next === "\n") return [el("br"), at + 2];
  return next !== undefined && /[!-/:-@[-`{-~]/.test(next) ? [next, at + 2] : undefined;
}

/** Start of a run of backticks -> start of the next run that is as long. */
function codeSpans(text) {
  const spans = new Map();
  const next = new Map();
  for (const run of [...text.matchAll(/`+/g)].reverse()) {
    const length = run[0].length;
    if (next.has(length)) spans.set(run.index, next.get(length));
    next.set(length, run.index);
  }
  return spans;
}

function readCode({ text, spans }, at, length) {
  const end = spans.get(at);
  if (end === undefined) return undefined;
  let code = text.slice(at + length, end).replaceAll("\n", " ");
  if (/^ .*[^ ].* $/.test(code)) code = code.slice(1, -1);
  return [el("code", {}, code), end + length];
}

const EMPHASIS = { 1: ["em"], 2: ["strong"], 3: ["em", "strong"] };

function readEmphasis(reader, at, run) {
  const { text, depth } = reader;
  if (run.length > 3 || (run[0] === "_" && at > 0 && WORD.test(text[at - 1]))) return undefined;
  for (let length = run.length; length > 0; length -= 1) {
    const from = at + length;
    const end = closing(reader, run.slice(0, length), from);
    if (end === undefined) continue;
    const [inner, ...outer] = run[0] === "~" ? ["del"] : EMPHASIS[length].toReversed();
    const node = withInline(el(inner), text.slice(from, end), depth + 1);
    return [outer.reduce((child, tag) => el(tag, {}, child), node), end + length];
  }
  return undefined;
}

/** Where `mark` closes what it opened before `from`. */
function closing({ text, spans, unclosed }, mark, from) {
  if (/^\s?$/.test(text[from] ?? "") || unclosed.has(mark)) return undefined;
  for (let at = from; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "`") at = spans.get(at) ?? at;
    else if (text[at] === mark[0]) {
      let length = 1;
      while (text[at + length] === mark[0]) length += 1;
      const fits = length === mark.length || (length === 3 && mark.length < 3);
      const closes = fits && at > from && !/\s/.test(text[at - 1]);
      if (closes && (mark[0] !== "_" || !WORD.test(text[at + length] ?? ""))) return at + length - mark.length;
      at += length - 1;
    }
  }
  unclosed.add(mark); // nor will one that opens later find its end
  return undefined;
}

function readLink({ text, spans, depth }, at, token) {
  const from = at + token.length;
  const end = labelEnd(text, spans, from);
  const destination = end === undefined ? null : match(DESTINATION, text, end + 1);
  if (destination === null) return undefined;
  const url = (destination[1] ?? destination[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  const node = link(url, "");
  // an image is a link, too: nothing is fetched from elsewhere
  return node && [withInline(node, text.slice(from, end), depth + 1), end + 1 + destination[0].length];
}

function labelEnd(text, spans, from) {
  const most = Math.min(text.length, from + MAX_LABEL);
  for (let at = from, open = 1; at < most; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "`") at = spans.get(at) ?? at;
    else if (text[at] === "[") open += 1;
    else if (text[at] === "]" && --open === 0) return at;
  }
  return undefined;
}

const SAFE = new Set(["http:", "https:", "mailto:"]);

/** A link that leads out of the page, or nothing where the address is not a whole one of a harmless kind. */
function link(url, text) {
  if (!URL.canParse(url) || !SAFE.has(new URL(url).protocol)) return undefined;
  return el("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer" }, text);
}

// ---- a text that grows -------------------------------------------------------------------------------------------

/** Shows Markdown in `root`. As the text grows, only its last blocks are made anew. */
export class MarkdownView {
  #root;
  #source = "";
  #settled = 0; // characters whose blocks no further text can change
  #open = []; // {raw, node, block} of those after them

  constructor(root) {
    this.#root = root;
  }

  /** Show `text`. */
  show(text) {
    if (!text.startsWith(this.#source)) {
      this.#root.replaceChildren();
      [this.#settled, this.#open] = [0, []];
    }
    this.#source = text;
    const lines = text.slice(this.#settled).split("\n");
    const blocks = parse(lines);
    const fresh = blocks.map((block, at) => this.#shown(lines, block, this.#open[at]));
    for (const { node } of this.#open.slice(fresh.length)) node.remove();
    // The next line may still join the last block to the one before it, and no other; while a line is blank so far,
    // it is not known whether it ends the block.
    const settled = isBlank(lines.at(-1)) ? 0 : Math.max(0, blocks.length - 2);
    if (settled > 0) {
      const upTo = blocks[settled].from;
      this.#settled += lines.slice(0, upTo).reduce((sum, line) => sum + line.length + 1, 0);
    }
    this.#open = fresh.slice(settled);
  }

  #shown(lines, block, old) {
    const raw = lines.slice(block.from, block.to).join("\n");
    if (old === undefined) {
      const node = build(block);
      this.#root.append(node);
      return { raw, node, block };
    }
    if (old.raw === raw && old.block.kind === block.kind) return old;
    if (block.kind === "code" && old.block.kind === "code" && block.language === old.block.language) {
      old.node.querySelector("code").textContent = block.text; // the button keeps its focus
      return { raw, node: old.node, block };
    }
    const node = build(block);
    old.node.replaceWith(node);
    return { raw, node, block };
  }
}
