// The blocks of a Markdown text: its lines to a tree.
//
// {kind: "code", language, text}, {kind: "math", text}, {kind: "rule"}, {kind: "heading", level, text},
// {kind: "quote", blocks}, {kind: "list", ordered, start, loose, items: [blocks]}, {kind: "table", align, head, rows},
// {kind: "paragraph", text}

export const MAX_DEPTH = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;
const MATH = { "$$": "$$", "\\[": "\\]" };

/** The blocks of these lines, in order; each says in `from` and `to` which lines it takes. */
export function parse(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const block = readBlock(lines, at, depth);
    blocks.push(Object.assign(block, { from: at }));
    at = block.to;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  if (depth < MAX_DEPTH) {
    const line = lines[at];
    if (FENCE.test(line)) return readFence(lines, at);
    if (mathEnd(line)) return readMath(lines, at);
    if (RULE.test(line)) return { kind: "rule", to: at + 1 };
    if (HEADING.test(line)) return readHeading(line, at);
    if (QUOTE.test(line)) return readQuote(lines, at, depth);
    if (ITEM.test(line)) return readList(lines, at, depth);
    if (isTable(lines, at)) return readTable(lines, at);
  }
  return readParagraph(lines, at);
}

function readFence(lines, at) {
  const [, fence, info] = FENCE.exec(lines[at]);
  const close = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  let to = at + 1;
  while (to < lines.length && !close.test(lines[to])) to += 1;
  const text = lines.slice(at + 1, to).join("\n");
  return { kind: "code", language: info.trim().split(/\s/)[0], text, to: Math.min(to + 1, lines.length) };
}

function mathEnd(line) {
  const start = line.trimStart().slice(0, 2);
  return Object.hasOwn(MATH, start) ? MATH[start] : undefined;
}

function readMath(lines, at) {
  const end = mathEnd(lines[at]);
  let to = at;
  let rest = lines[at].trimStart().slice(2);
  while (!rest.includes(end)) {
    to += 1;
    if (to === lines.length) break;
    if (isBlank(lines[to]) && to < lines.length - 1) return readParagraph(lines, at);
    rest = lines[to];
  }
  if (to < lines.length && !rest.trimEnd().endsWith(end)) return readParagraph(lines, at);
  to = Math.min(to + 1, lines.length);
  return { kind: "math", text: lines.slice(at, to).join("\n").trim(), to };
}

function readHeading(line, at) {
  const [, marks, text] = HEADING.exec(line);
  return { kind: "heading", level: marks.length, text: text.trim().replace(/(?:^|\s)#+$/, ""), to: at + 1 };
}

function readQuote(lines, at, depth) {
  const inner = [];
  for (; at < lines.length && !isBlank(lines[at]); at += 1) {
    if (!QUOTE.test(lines[at]) && startsBlock(lines, at)) break;
    inner.push(lines[at].replace(QUOTE, ""));
  }
  return { kind: "quote", blocks: parse(inner, depth + 1), to: at };
}

function readList(lines, at, depth) {
  const kindOf = (item) => item[2].at(-1);
  const first = ITEM.exec(lines[at]);
  const items = [];
  let loose = false;
  for (let next = at; next < lines.length; next = skipBlank(lines, at)) {
    const item = ITEM.exec(lines[next]);
    if (!item || kindOf(item) !== kindOf(first) || RULE.test(lines[next])) break;
    const { content, to } = readItem(lines, next, item);
    const blocks = parse(content, depth + 1);
    loose ||= (items.length > 0 && next > at) || blocks.some((block, n) => n > 0 && block.from > blocks[n - 1].to);
    items.push(blocks);
    at = to;
  }
  const ordered = first[2].length > 1;
  return { kind: "list", ordered, start: parseInt(first[2], 10), loose, items, to: at };
}

function readItem(lines, at, item) {
  const width = item[1].length + item[2].length + 1;
  const least = item[1].length + 2; // models indent what is inside "1." by two spaces as often as by three
  const content = [item[3] ?? ""];
  let to = at + 1;
  while (to < lines.length) {
    const next = skipBlank(lines, to);
    const inside = next < lines.length && indentation(lines[next]) >= least;
    if (next > to) {
      if (!inside) break;
      content.push(...lines.slice(to, next).fill(""));
    } else if (!inside && (ITEM.test(lines[to]) || startsBlock(lines, to))) break;
    content.push(unindent(lines[next], width));
    to = next + 1;
  }
  if (content[0] === "") content.shift();
  return { content, to };
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !lines[at + 1].includes("-")) return false;
  const marks = cells(lines[at + 1]);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[at]).length;
}

function readTable(lines, at) {
  const align = cells(lines[at + 1]).map(
    (mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : undefined),
  );
  const head = cells(lines[at]);
  const rows = [];
  let to = at + 2;
  for (; to < lines.length && !isBlank(lines[to]) && !startsBlock(lines, to); to += 1) rows.push(cells(lines[to]));
  return { kind: "table", align, head, rows, to };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, at) {
  let to = at + 1;
  while (to < lines.length && !isBlank(lines[to]) && !startsBlock(lines, to)) to += 1;
  return { kind: "paragraph", text: lines.slice(at, to).map((line) => line.trimStart()).join("\n").trimEnd(), to };
}

/** Whether this line ends the paragraph before it. */
function startsBlock(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || mathEnd(line)) return true;
  const item = ITEM.exec(line);
  if (item) return Boolean(item[3]) && (item[2].length === 1 || parseInt(item[2], 10) === 1);
  return isTable(lines, at);
}

export const isBlank = (line) => line.trim() === "";

function skipBlank(lines, at) {
  while (at < lines.length && isBlank(lines[at])) at += 1;
  return at;
}

function indentation(line) {
  let columns = 0;
  for (const char of line) {
    if (char !== " " && char !== "\t") break;
    columns += char === "\t" ? 4 : 1;
  }
  return columns;
}

function unindent(line, columns) {
  let at = 0;
  while (columns > 0 && (line[at] === " " || line[at] === "\t")) {
    columns -= line[at] === "\t" ? 4 : 1;
    at += 1;
  }
  return " ".repeat(Math.max(0, -columns)) + line.slice(at);
}
