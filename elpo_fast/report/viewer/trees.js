"use strict";
// The page of `elpo tree html`. Nothing of what a model wrote becomes markup: its texts are text nodes
// of elements that `el` makes.

const $ = (id) => document.getElementById(id);
const INDEX = JSON.parse($("index").textContent);
const DETAILS = $("details").textContent.split("\n");
const TOKENS = $("tokens").textContent.split("\n");
const T = INDEX.trees;
const COUNT = T.task.length;
const ROW_HEIGHT = 46;
const NAMES = { answer: "by an answer", turn_limit: "at the turn limit", length: "at the token limit",
  fault: "by a fault" };

function el(tag, attributes, ...children) {
  const svg = ["svg", "g", "path", "circle", "text", "title", "rect"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

// Of what is not finite, JSON has nothing.
const number = (value, digits = 2) => value === null ? "not finite"
  : (Math.abs(value) < 0.5 / 10 ** digits ? 0 : value).toFixed(digits).replace("-", "−");
const signed = (value, digits = 2) => {
  const text = number(value, digits);
  return value > 0 && Number(text) !== 0 ? "+" + text : text;
};
const small = (value) => value === 0 ? "0" : Math.abs(value) >= 0.001 ? signed(value, 4)
  : value.toExponential(1).replace("-", "−");
const tone = (correct, all) => !all ? "none" : correct === all ? "good" : correct ? "mixed" : "bad";
const marks = (outcomes) => outcomes.match(/1+|0+/g).map((run) => run[0] === "1"
  ? el("span", { class: "good" }, "✓".repeat(run.length)) : el("span", { class: "bad" }, "✗".repeat(run.length)));
const plural = (n, thing) => `${n} ${thing}${n === 1 ? "" : "s"}`;
const trajectories = (n) => `${n} ${n === 1 ? "trajectory" : "trajectories"}`;

// --- data ---------------------------------------------------------------------------------------

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const kept = new Map();  // trees looked at, the latest last
async function treeAt(index) {
  let tree = kept.get(index);
  if (!tree) {
    const [figures, texts] = (await unpacked(DETAILS[index])).split("\n");
    tree = prepared(JSON.parse(figures), JSON.parse(texts), index);
  }
  kept.delete(index);
  kept.set(index, tree);
  if (kept.size > 40) kept.delete(kept.keys().next().value);
  return tree;
}

async function tokensOf(tree) {
  tree.tokens ??= JSON.parse(await unpacked(TOKENS[tree.index]));
  return tree.tokens;
}

function prepared(figures, texts, index) {
  const tree = { ...figures, ...texts, index, size: figures.parent.length };
  tree.children = Array.from({ length: tree.size }, () => []);
  tree.depth = new Array(tree.size).fill(0);
  tree.leafOf = new Map(tree.leaf.map((node, ordinal) => [node, ordinal]));
  tree.under = Array.from({ length: tree.size }, () => []);  // trajectories through each node
  tree.leaf.forEach((leaf, ordinal) => {
    for (let node = leaf; node >= 0; node = tree.parent[node]) tree.under[node].push(ordinal);
  });
  for (let node = 1; node < tree.size; node++) {
    tree.children[tree.parent[node]].push(node);
    tree.depth[node] = tree.depth[tree.parent[node]] + 1;
  }
  tree.critical.forEach((found, search) => {
    // A search is over with its last probe; one that needs none with its trajectory.
    const probes = tree.rounds.filter((round) => round.search === search);
    const last = probes[probes.length - 1];
    found.probes = probes.length;
    found.known = last ? last.first + last.count : found.leaf + 1;
  });
  tree.bad = new Set(tree.malformed);
  tree.pinned = new Set([0]);  // the ways to critical steps
  for (const found of tree.critical) for (const node of pathTo(tree, found.node)) tree.pinned.add(node);
  tree.alike = new Array(tree.size);  // what `groups` found
  return tree;
}

// Trajectories below each node among the first `upto`, and the correct ones of them.
function counted(tree, upto) {
  if (tree.counts?.upto === upto) return tree.counts;
  const below = new Array(tree.size).fill(0), correct = new Array(tree.size).fill(0);
  for (let ordinal = 0; ordinal < upto; ordinal++) {
    for (let node = tree.leaf[ordinal]; node >= 0; node = tree.parent[node]) {
      below[node]++;
      correct[node] += tree.correct[ordinal];
    }
  }
  return tree.counts = { upto, below, correct };
}

function pathTo(tree, node) {
  const path = [];
  for (; node >= 0; node = tree.parent[node]) path.push(node);
  return path.reverse();
}

// Found critical steps by node; one that some search localized counts as localized.
function criticalNodes(tree, upto) {
  const found = new Map();
  for (const each of tree.critical) {
    if (each.known <= upto && !found.get(each.node)?.localized) found.set(each.node, each);
  }
  return found;
}

// What a step and the answer to it say, empty where nobody can read it.
function reading(tree, node) {
  const text = [tree.words[node], tree.call[node], tree.response[node]];
  return text.some(Boolean) ? JSON.stringify(text) : "";
}

// The other children of its parent that read as a step does.
function alikeTo(tree, node) {
  const own = reading(tree, node);
  return tree.children[tree.parent[node]].filter((other) => own && other !== node && reading(tree, other) === own);
}

// Children that read alike, as lists; a step that nobody can read is like no other, and one on the
// way to a critical step stands alone.
function groups(tree, node) {
  if (tree.alike[node]) return tree.alike[node];
  const found = new Map();
  for (const child of tree.children[node]) {
    const ordinal = tree.leafOf.get(child);
    const text = reading(tree, child);
    const verdict = ordinal === undefined ? "" : tree.reason[ordinal] + tree.correct[ordinal];
    const key = text && !tree.pinned.has(child) ? text + verdict : `${child}`;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(child);
  }
  return tree.alike[node] = [...found.values()];
}

// --- state --------------------------------------------------------------------------------------

const state = { index: -1, node: 0, view: "step", leaf: null, upto: 0, heat: "" };
let tree = null;      // the one shown
let folded = new Set();  // nodes, and "=N" for unfolded groups that begin with node N
let shown = [];       // indices of the trees that pass the filters
let searchable = new Array(COUNT).fill(null);  // what each tree says, in lower case
let player = null;
let opening = 0;

const keyOf = (index) => T.step[index] === null ? `${T.tree[index]}` : `${T.step[index]}.${T.tree[index]}`;
const placeOf = new Map(Array.from({ length: COUNT }, (_, index) => [keyOf(index), index]));
const titleOf = (index) => T.step[index] === null ? `tree ${T.tree[index]}`
  : `step ${T.step[index]} · tree ${T.tree[index]}`;

function remember() {
  if (!tree) return;
  const hash = new URLSearchParams({ tree: keyOf(state.index), node: state.node });
  if (state.view !== "step") hash.set("view", state.view);
  if (state.view === "chat" && state.leaf !== null) hash.set("leaf", state.leaf);
  if (state.upto < tree.leaf.length) hash.set("upto", state.upto);
  if (state.heat) hash.set("colour", state.heat);
  for (const [name, value] of Object.entries(wanted())) if (value) hash.set(name, value);
  history.replaceState(null, "", "#" + hash);
}

async function recall() {
  const hash = new URLSearchParams(location.hash.slice(1));
  $("text").value = hash.get("text") || "";
  $("task").value = hash.get("task") || "";
  $("localized").checked = hash.has("localized");
  $("malformed").checked = hash.has("malformed");
  for (const each of document.getElementsByName("outcome")) each.checked = each.value === (hash.get("outcome") || "");
  filter();
  state.heat = hash.get("colour") || "";
  $("heat").value = state.heat;
  state.view = hash.get("view") === "chat" ? "chat" : "step";
  const index = placeOf.get(hash.get("tree"));
  const node = hash.has("node") ? Number(hash.get("node")) : null;
  await open(index ?? interesting(), node, hash.has("upto") ? Number(hash.get("upto")) : null,
    hash.has("leaf") ? Number(hash.get("leaf")) : null);
}

// The latest step's first tree with a localized step and a success, or else what comes nearest.
function interesting() {
  const value = (index) => (T.localized[index] ? 8 : 0) + (T.outcomes[index].includes("1") ? 4 : 0)
    + (T.step[index] === T.step[COUNT - 1] ? 2 : 0) + (T.malformed[index] ? 0 : 1);
  const among = shown.length ? shown : [...Array(COUNT).keys()];
  return among.reduce((best, index) => value(index) > value(best) ? index : best, among[0]);
}

async function open(index, node = null, upto = null, leaf = null) {
  stop();
  const mine = ++opening;
  const loaded = await treeAt(index);
  if (mine !== opening) return;  // another one was asked for meanwhile
  state.index = index;
  tree = loaded;
  const within = (value, end) => Number.isInteger(value) && value >= 0 && value < end;
  state.upto = within(upto, tree.leaf.length) ? upto : tree.leaf.length;
  state.leaf = within(leaf, tree.leaf.length) ? leaf : null;
  const critical = [...criticalNodes(tree, tree.leaf.length).values()];
  const first = critical.find((each) => each.localized) || critical[0];
  state.node = within(node, tree.size) ? node : first ? first.node : Math.min(1, tree.size - 1);
  foldAll();
  reveal(state.node);
  drawHead();
  drawAll();
  document.querySelector("main").scrollTop = 0;
  scrollTo(index);
}

// All but the ways to critical steps, and what follows right after these.
function foldAll() {
  folded = new Set(tree.children.keys());
  for (const node of tree.pinned) folded.delete(node);
}

function reveal(node) {
  for (const at of pathTo(tree, node)) {
    if (at !== node) folded.delete(at);
    if (at === 0) continue;
    if (tree.pinned.has(at)) continue;
    const alike = groups(tree, tree.parent[at]).find((group) => group.includes(at));
    if (alike.length > 1 && at !== alike[0]) folded.add("=" + alike[0]);
  }
}

// --- list ---------------------------------------------------------------------------------------

function wanted() {
  return {
    text: $("text").value.trim(), task: $("task").value.trim(),
    outcome: document.querySelector("[name=outcome]:checked").value,
    localized: $("localized").checked ? "1" : "", malformed: $("malformed").checked ? "1" : "",
  };
}

function filter() {
  const { text, task, outcome, localized, malformed } = wanted();
  const sought = JSON.stringify(text.toLowerCase()).slice(1, -1);
  let unread = 0;
  shown = [];
  for (let index = 0; index < COUNT; index++) {
    const outcomes = T.outcomes[index];
    const won = outcomes.includes("1"), lost = outcomes.includes("0");
    if (outcome === "mixed" && !(won && lost)) continue;
    if (outcome === "failed" && won) continue;
    if (outcome === "solved" && lost) continue;
    if (localized && !T.localized[index]) continue;
    if (malformed && !T.malformed[index]) continue;
    if (task && !T.task[index].includes(task)) continue;
    if (sought && !T.task[index].toLowerCase().includes(sought)) {
      if (searchable[index] === null) { unread++; continue; }
      if (!searchable[index].includes(sought)) continue;
    }
    shown.push(index);
  }
  $("count").textContent = `${shown.length} of ${plural(COUNT, "tree")}`
    + (unread ? ` · still reading ${unread}` : "");
  $("rows").style.height = shown.length * ROW_HEIGHT + "px";
  drawList();
}

function drawList() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_HEIGHT) + 4);
  const rows = [];
  for (let place = first; place < last; place++) {
    const index = shown[place], outcomes = T.outcomes[index];
    const won = [...outcomes].filter((each) => each === "1").length;
    rows.push(el("div", {
      class: "tree" + (index === state.index ? " chosen" : ""), style: `top:${place * ROW_HEIGHT}px`,
      role: "option", "aria-selected": index === state.index, title: T.task[index],
      onclick: () => open(index),
    },
    el("div", {},
      el("span", { class: "task" }, T.task[index]),
      el("span", { class: "fig " + tone(won, outcomes.length) }, `${won}/${outcomes.length}`)),
    el("div", {},
      el("span", { class: "strip" }, marks(outcomes)),
      T.localized[index] ? el("span", { class: "flag", title: "first irrecoverable steps found" }, `◀ ${T.localized[index]}`) : null,
      T.open[index] ? el("span", { class: "flag open", title: "searches that the budget ended" }, `◁ ${T.open[index]}`) : null,
      T.malformed[index] ? el("span", { class: "flag open", title: "malformed calls" }, `⚠ ${T.malformed[index]}`) : null,
      el("span", { class: "dim fig" }, T.step[index] === null ? "" : `step ${T.step[index]}`))));
  }
  $("rows").replaceChildren(...rows);
  if (!shown.length) $("rows").append(el("div", { class: "nothing" }, "no tree is like this"));
}

function scrollTo(index) {
  const place = shown.indexOf(index), list = $("list");
  if (place >= 0) {
    const top = place * ROW_HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
  }
  drawList();
}

// Texts for the search are read while nothing else is to do.
async function readTexts() {
  for (let index = 0; index < COUNT; index++) {
    const all = await unpacked(DETAILS[index]);
    searchable[index] = all.slice(all.indexOf("\n") + 1).toLowerCase();
    if (index % 20 === 19) {
      if ($("text").value) filter();
      await new Promise((resolve) => setTimeout(resolve));
    }
  }
  if ($("text").value) filter();
  document.body.dataset.searchable = "yes";
}

// --- the tree -----------------------------------------------------------------------------------

function drawHead() {
  const head = $("head"), all = tree.leaf.length;
  const won = tree.correct.reduce((sum, each) => sum + each, 0);
  const task = [...tree.prompt].reverse().find((message) => message.role === "user");
  head.replaceChildren(
    el("div", {},
      el("span", { class: "task" }, T.task[state.index] || "a tree"), " ",
      el("span", { class: "dim" }, titleOf(state.index)), " · ",
      el("b", { class: tone(won, all) }, `${won} of ${all} correct`),
      el("span", { class: "dim" }, ` · node reward ${number(tree.node_reward[0])}`)),
    task ? el("div", { class: "prompt" }, task.content) : "",
  );
  const failed = all - won;
  if (!tree.critical.length) {
    head.append(el("div", { class: "dim" }, !failed ? "All trajectories are correct: there is nothing to localize."
      : `No search for a first irrecoverable step in this tree (planner ${INDEX.planner}).`));
  }
  head.append(el("div", { class: "searches" }, tree.critical.map(criticalBanner)));
}

function criticalBanner(found) {
  const where = `${stepName(found.node)} of trajectory #${found.leaf}`;
  const counts = counted(tree, tree.leaf.length);
  const up = tree.parent[found.node];
  const evidence = [];
  if (up > 0) evidence.push(`${counts.correct[up]} of ${trajectories(counts.below[up])} through the step before it correct`);
  evidence.push(`${counts.correct[found.node]} of ${counts.below[found.node]} through it`);
  const alike = alikeTo(tree, found.node);
  const won = alike.reduce((sum, other) => sum + counts.correct[other], 0);
  if (won) {
    const of = alike.reduce((sum, other) => sum + counts.below[other], 0);
    evidence.push(`${won} of ${of} through others like it`);
  }
  const how = found.probes ? `${plural(found.probes, "probe")}; `
    : found.localized ? "a single tool call, no probe needed; " : "no probe; ";
  return el("div", { class: "found" + (found.localized ? "" : " open"), onclick: () => choose(found.node) },
    el("b", {}, found.localized ? `◀ First irrecoverable step: ${where}.`
      : `◁ Not localized, the budget was spent: ${where}, or later.`),
    ` ${how}${evidence.join(", ")}.`);
}

const stepName = (node) => tree.names ? tree.names[node] : node ? `step ${tree.depth[node]}` : "the prompt";

function drawAll() {
  drawMap();
  drawReplay();
  drawOutline();
  drawDetail();
  remember();
}

function choose(node, scroll = true) {
  state.node = node;
  const ordinals = tree.under[node];
  if (!ordinals.includes(state.leaf)) state.leaf = null;
  reveal(node);
  drawMap();
  drawOutline();
  drawDetail();
  remember();
  if (scroll) document.querySelector(".row.chosen")?.scrollIntoView({ block: "nearest" });
}

// Leaves from top to bottom as the outline has them.
function layout() {
  if (tree.places) return tree.places;
  const y = new Array(tree.size), count = { leaves: 0 };
  const order = [];
  const stack = [0];
  while (stack.length) {
    const node = stack.pop();
    order.push(node);
    stack.push(...groups(tree, node).flat().reverse());
  }
  for (const node of order) if (!tree.children[node].length) y[node] = count.leaves++;
  for (const node of order.reverse()) {
    const below = tree.children[node];
    if (below.length) y[node] = (Math.min(...below.map((n) => y[n])) + Math.max(...below.map((n) => y[n]))) / 2;
  }
  return tree.places = { y, rows: count.leaves };
}

function roundAt(upto) {
  return tree.rounds.filter((round) => round.first < upto).pop();
}

function drawMap() {
  const { y, rows } = layout();
  const { below, correct } = counted(tree, state.upto);
  const critical = criticalNodes(tree, state.upto);
  const round = state.upto < tree.leaf.length || player ? roundAt(state.upto) : null;
  const suspects = new Set(round && round.search !== null ? round.suspects : []);
  const references = new Set();
  const searches = round && round.search !== null ? [tree.critical[round.search]] : [...critical.values()];
  for (const each of searches) for (const node of pathTo(tree, tree.leaf[each.leaf])) references.add(node);
  const lost = new Set();  // from a critical step on
  for (const found of critical.values()) {
    const path = pathTo(tree, tree.leaf[found.leaf]);
    for (const node of path.slice(path.indexOf(found.node))) lost.add(node);
  }
  const fresh = new Set();
  if (round) {
    for (let ordinal = round.first; ordinal < Math.min(state.upto, round.first + round.count); ordinal++) {
      const path = pathTo(tree, tree.leaf[ordinal]);
      for (const node of path.slice(path.indexOf(round.node) + 1)) fresh.add(node);
    }
  }
  const deepest = Math.max(...tree.depth);
  const width = $("map").clientWidth - 4;
  const dx = Math.max(34, Math.min(120, (width - 190) / deepest));
  const dy = Math.max(13, Math.min(24, 250 / rows));
  const X = (node) => 26 + tree.depth[node] * dx, Y = (node) => 30 + y[node] * dy;
  // One path for edges that look the same. Only numbers and words of this page become markup.
  const edges = new Map(), nodes = [];
  for (let node = 0; node < tree.size; node++) {
    if (!below[node]) continue;
    const up = tree.parent[node], x = X(node), at = Y(node).toFixed(1);
    if (up >= 0) {
      const x0 = X(up), y0 = Y(up).toFixed(1), bend = x0 + dx * 0.5;
      const kind = "edge" + (references.has(node) ? " reference" : "") + (lost.has(node) ? " lost" : "") + (fresh.has(node) ? " fresh" : "");
      edges.set(kind, `${edges.get(kind) || ""}M${x0},${y0}C${bend},${y0} ${bend},${at} ${x},${at}`);
    }
    const found = critical.get(node), ordinal = tree.leafOf.get(node), open = found && !found.localized ? " open" : "";
    const marked = [suspects.has(node) ? '<circle class="suspect" r="11"/>' : "",
      `<circle class="fill-${tone(correct[node], below[node])}" r="${node ? 5.5 : 7}"/>`];
    if (node === state.node) marked.push(`<circle class="halo" r="${found || suspects.has(node) ? 14 : 9}"/>`);
    if (found) marked.push(`<circle class="crit${open}" r="10"/><text class="label${open}" y="-13" text-anchor="middle">${open ? "here or later" : "first irrecoverable"}</text>`);
    if (ordinal !== undefined) marked.push(`<text x="10" y="4" class="${tree.correct[ordinal] ? "good" : "bad"}">${tree.correct[ordinal] ? "✓" : "✗"} #${ordinal}</text>`);
    nodes.push(`<g class="node${node === state.node ? " chosen" : ""}" data-node="${node}" transform="translate(${x},${at})">${marked.join("")}</g>`);
  }
  const depths = Array.from({ length: deepest }, (_, at) => `<text class="depth" x="${26 + (at + 1) * dx}" y="11" text-anchor="middle">${at ? at + 1 : "step 1"}</text>`);
  const svg = el("svg", {
    width: Math.max(width, X(0) + deepest * dx + 70), height: 44 + (rows - 1) * dy + 6, role: "img",
    "aria-label": "the tree, steps from left to right, trajectories from top to bottom",
  });
  svg.innerHTML = [...[...edges].map(([kind, d]) => `<path class="${kind}" d="${d}"/>`), ...nodes, ...depths].join("");
  const map = $("map"), x = X(state.node), top = Y(state.node);
  map.replaceChildren(svg);
  if (x < map.scrollLeft + 30 || x > map.scrollLeft + map.clientWidth - 60) map.scrollLeft = x - map.clientWidth / 2;
  if (top < map.scrollTop + 30 || top > map.scrollTop + map.clientHeight - 20) map.scrollTop = top - map.clientHeight / 2;
}

function snippet(node) {
  if (node === 0) return "";
  return [tree.words[node], tree.call[node], tree.response[node] && "→ " + tree.response[node]]
    .filter(Boolean).join(" ").replace(/\s+/g, " ").slice(0, 200);
}

function roundText(round) {
  const outcomes = tree.correct.slice(round.first, round.first + round.count).join("");
  const where = round.node === 0 ? `${round.count} full` : `${round.count} from after ${stepName(round.node)}`;
  let says = "";
  if (round.search !== null) {
    const found = tree.critical[round.search];
    const over = found.known === round.first + round.count;
    // Only bisection takes a prefix whose few continuations fail for lost.
    says = round.correct ? "error is later" : `error is ${INDEX.planner === "bel" ? "" : "rather "}here or earlier`;
    if (over && found.localized) says += `: ${stepName(found.node)}`;
  }
  return { where, outcomes, says };
}

function drawReplay() {
  const all = tree.leaf.length;
  const now = roundAt(state.upto);
  const bar = el("div", { class: "bar" },
    el("button", { id: "play", title: "replay the search (Space)", onclick: play }, player ? "❚❚" : "▶ replay"),
    el("input", {
      type: "range", id: "upto", min: 1, max: all, value: state.upto, "aria-label": "trajectories sampled so far",
      oninput: (event) => { stop(); upTo(Number(event.target.value)); },
    }),
    el("span", { class: "dim fig" }, `${state.upto} of ${trajectories(all)}`));
  const rounds = el("ol", {}, tree.rounds.map((round, place) => {
    const { where, outcomes, says } = roundText(round);
    const later = round.first >= state.upto;
    return el("li", {
      class: "round" + (later ? " later" : "") + (round === now && state.upto < all ? " now" : ""),
      title: "show the tree as it was then",
      onclick: () => { stop(); upTo(round.first + round.count); choose(round.node); },
    },
    `${place + 1}. ${where} `,
    marks(outcomes),
    says ? el("span", { class: "says" }, ` ${says}`) : null);
  }));
  const had = document.activeElement?.id;
  $("replay").replaceChildren(bar, rounds);
  if (had === "upto" || had === "play") $(had).focus();
}

function upTo(ordinals) {
  state.upto = Math.max(1, Math.min(tree.leaf.length, ordinals));
  drawAll();
}

function stop() {
  clearInterval(player);
  player = null;
}

function play() {
  if (player) { stop(); drawReplay(); return; }
  if (state.upto === tree.leaf.length) state.upto = 0;
  player = setInterval(() => {
    upTo(state.upto + 1);
    if (state.upto === tree.leaf.length) { stop(); drawAll(); }
  }, 700);
  upTo(state.upto + 1);
}

// Rows of the outline from top to bottom: a node, or a folded group of equal siblings.
function visibleRows() {
  const rows = [];
  // Steps that follow without a branch stand below each other; siblings, and what follows them, further in.
  const visit = (node, indent, alike, sibling) => {
    rows.push({ node, indent, alike });
    if (folded.has(node)) return;
    const branches = tree.children[node].length > 1;
    const inner = branches || sibling ? indent + 1 : indent;
    for (const group of groups(tree, node)) {
      if (group.length === 1) visit(group[0], inner, null, branches);
      else if (folded.has("=" + group[0])) for (const each of group) visit(each, inner, each === group[0] ? group : null, branches);
      else rows.push({ node: group[0], indent: inner, alike: group, together: true });
    }
  };
  visit(0, 0, null, true);
  return rows;
}

function drawOutline() {
  const { below, correct } = counted(tree, state.upto);
  const critical = criticalNodes(tree, state.upto);
  const head = el("div", { class: "row top" }, el("span", {}, "steps"), el("span", { class: "n" }, "correct"),
    el("span", { class: "n", title: "node reward r, Eq. 6" }, "reward r"),
    el("span", { class: "n", title: "advantage of the step" }, "adv. A"));
  $("outline").replaceChildren(head, ...visibleRows().map((row) => outlineRow(row, below, correct, critical)));
}

function outlineRow({ node, indent, alike, together }, below, correct, critical) {
  const members = together ? alike : [node];
  const sum = (values) => members.reduce((total, each) => total + values[each], 0);
  const all = sum(below), won = sum(correct);
  const found = members.map((each) => critical.get(each)).find(Boolean);
  const ordinal = together ? undefined : tree.leafOf.get(node);
  const closed = together || folded.has(node);
  const foldable = alike || tree.children[node].length;
  const line = el("div", { class: "line" }, Array.from({ length: indent }, () => el("i", { class: "guide" })),
    el("button", {
      class: "fold", tabindex: -1, "aria-label": closed ? "unfold" : "fold",
      onclick: (event) => { event.stopPropagation(); toggle(node, alike); },
    }, foldable ? closed ? "▸" : "▾" : "·"),
    el("span", { class: "where " + tone(won, all) }, node ? tree.names ? tree.names[node] : `${tree.depth[node]}` : "task"),
    together ? el("span", { class: "tag dim", title: "siblings that read alike" }, `${alike.length} alike`) : null,
    found ? el("span", { class: `tag ${found.localized ? "bad" : "mixed"}` },
      found.localized ? "◀ first irrecoverable" : "◁ here or later") : null,
    tree.bad.has(node) ? el("span", { class: "tag mixed" }, "⚠ malformed") : null);
  if (node) {
    const short = (text) => text.replace(/\s+/g, " ").slice(0, 240);
    if (tree.words[node]) line.append(el("span", { class: "words" }, short(tree.words[node])));
    if (tree.call[node] !== null) line.append(el("span", { class: "call" }, ...highlighted(short(tree.call[node]))));
    if (tree.response[node]) line.append(el("span", { class: "heard" }, "→ " + short(tree.response[node])));
    const single = closed && !together && tree.children[node].length ? tree.under[node] : [];
    const leaf = ordinal ?? (together ? tree.leafOf.get(node) : single.length === 1 ? single[0] : undefined);
    if (single.length === 1) line.append(el("span", { class: "dim" }, "…"));
    if (leaf !== undefined) {
      line.append(el("span", { class: "why " + (tree.correct[leaf] ? "good" : "bad") },
        `${tree.correct[leaf] ? "✓" : "✗"} ${together ? "" : `#${leaf} `}${tree.reason[leaf] || tree.end[leaf]}`));
    }
  }
  const mean = (values) => members.reduce((total, each) => total + values[each], 0) / members.length;
  return el("div", {
    class: "row" + (members.includes(state.node) ? " chosen" : "") + (all ? "" : " unseen")
      + (found ? found.localized ? " critical" : " critical open" : ""),
    role: "treeitem", "aria-expanded": foldable ? !closed : null, "data-node": node,
    onclick: () => choose(node, false),
  }, line,
  el("span", { class: "n " + tone(won, all) }, all ? `${won}/${all}` : ""),
  el("span", { class: "n" }, number(mean(tree.node_reward))),
  el("span", { class: "n" }, signed(mean(tree.advantage))));
}

function toggle(node, alike) {
  const key = alike ? "=" + alike[0] : node;
  if (folded.has(key)) folded.delete(key); else folded.add(key);
  drawOutline();
}

// --- one step, one trajectory -------------------------------------------------------------------

const CODE = new RegExp([
  "(?<com>#[^\\n]*)",
  "(?<str>\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?)",
  "(?<num>\\b\\d[\\d_]*\\.?\\d*(?:[eE][+-]?\\d+)?\\b)",
  "(?<kw>\\b(?:and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield|True|False|None|true|false|null)\\b)",
  "(?<fn>\\b[A-Za-z_]\\w*(?=\\())",
].join("|"), "g");

function highlighted(text) {
  const parts = [];
  let last = 0;
  for (const match of text.matchAll(CODE)) {
    if (match.index > last) parts.push(text.slice(last, match.index));
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    parts.push(el("span", { class: kind }, match[0]));
    last = match.index + match[0].length;
  }
  parts.push(text.slice(last));
  return parts;
}

function wordsOf(text) {
  const thought = /^(?:\s*<think>)?([^]*?)<\/think>([^]*)$/.exec(text);
  if (!thought) return el("div", { class: "words" }, text);
  return el("div", {}, thought[1].trim() ? el("details", { class: "think" },
    el("summary", {}, `thinking, ${plural(thought[1].trim().split(/\s+/).length, "word")}`),
    el("div", { class: "words" }, thought[1].trim())) : null,
  el("div", { class: "words" }, thought[2].trim()));
}

function said(node, tokens) {
  if (state.heat && tokens?.[node]) return coloured(node, tokens[node]);
  const parts = [];
  if (tree.words[node]) parts.push(wordsOf(tree.words[node]));
  if (tree.call[node] !== null) {
    if (tree.tool[node]) parts.push(el("div", { class: "dim" }, `calls ${tree.tool[node]}`));
    parts.push(el("pre", { class: "code" + (tree.bad.has(node) ? " broken" : "") }, ...highlighted(tree.call[node])));
  }
  return parts.length ? parts : [el("div", { class: "dim" }, "no text")];
}

const coefficient = (node) => tree.pos[node] + tree.neg[node];

// What is recorded of tokens: its column, and what it is called where it was not.
const RECORDED = {
  logprob: [1, "log-probs"], entropy: [2, "entropies"], ratio: [3, "ratios: elpo tree html RUN --ratios computes them"],
};

function coloured(node, [texts, logprobs, entropies, ratios]) {
  const largest = Math.max(1e-12, ...tree.pos, ...tree.neg.map(Math.abs));
  const values = state.heat === "logprob" ? logprobs : state.heat === "entropy" ? entropies : null;
  const c = coefficient(node);
  const spans = texts.map((text, at) => {
    let colour = "transparent";
    if (state.heat === "ratio") colour = moved(ratios?.[at]);
    else if (values && values[at] === null) colour = shade("150,50,220", 1);
    else if (values) colour = shade("230,120,20", Math.min(1, Math.abs(values[at]) / (state.heat === "logprob" ? 4 : 2)));
    else if (state.heat === "coefficient") colour = shade(c > 0 ? "20,160,100" : "220,60,40", Math.abs(c) / largest);
    const says = [`token ${at + 1} of ${texts.length}`];
    if (logprobs) says.push(`log-prob ${number(logprobs[at], 3)}`);
    if (logprobs && logprobs[at] !== null) says.push(`probability ${number(Math.exp(logprobs[at]), 3)}`);
    if (entropies) says.push(`entropy ${number(entropies[at], 3)} nats`);
    if (ratios) says.push(`importance ratio ${number(ratios[at], 3)}`);
    says.push(`loss coefficient ${small(c)}`);
    return el("span", { style: `background:${colour}`, title: says.join("\n") }, text);
  });
  return [el("pre", { class: "tokens" }, spans)];
}

const shade = (rgb, strength) => strength < 0.02 ? "transparent" : `rgba(${rgb},${(0.08 + 0.72 * strength).toFixed(3)})`;

// The colour of a ratio: green where the token became likelier, red where less likely.
function moved(ratio) {
  if (ratio === null || ratio === undefined) return shade("150,50,220", 1);
  return shade(ratio > 1 ? "20,160,100" : "220,60,40", Math.min(1, Math.abs(Math.log(ratio)) / Math.log(1.5)));
}

function drawLegend() {
  const sides = {
    logprob: ["0", "rgba(230,120,20,.08),rgba(230,120,20,.8)", "−4 nats and less"],
    entropy: ["0", "rgba(230,120,20,.08),rgba(230,120,20,.8)", "2 nats and more"],
    ratio: ["0.67 and less", "rgba(220,60,40,.8),transparent,rgba(20,160,100,.8)", "1.5 and more"],
    coefficient: ["pushed down", "rgba(220,60,40,.8),transparent,rgba(20,160,100,.8)", "pushed up"],
  }[state.heat];
  $("legend").replaceChildren(...(sides ? [sides[0], el("i", { style: `background:linear-gradient(90deg,${sides[1]})` }), sides[2]] : []));
}

let drawing = 0;
async function drawDetail() {
  const mine = ++drawing;
  const tokens = state.heat ? await tokensOf(tree) : null;
  if (mine !== drawing) return;
  const recorded = tokens?.find(Boolean);
  const [column, called] = RECORDED[state.heat] || [];
  if (column && !recorded?.[column]) {
    $("legend").replaceChildren(`these trees carry no ${called}`);
  } else drawLegend();
  $("tab-step").setAttribute("aria-selected", state.view === "step");
  $("tab-chat").setAttribute("aria-selected", state.view === "chat");
  const parts = state.view === "step" ? stepView(tokens) : chatView(tokens);
  $("detail").replaceChildren(...parts.flat().filter(Boolean));
  if (state.view === "chat") document.querySelector(".bubble.chosen")?.scrollIntoView({ block: "nearest" });
  else $("detail").scrollTop = 0;
}

function figure(name, value, title = null) {
  return el("div", { title }, el("b", {}, value), el("span", {}, name));
}

function stepView(tokens) {
  const node = state.node, critical = criticalNodes(tree, state.upto).get(node);
  const { below, correct } = counted(tree, state.upto);
  const parts = [el("h2", {}, node ? stepName(node).replace(/^s/, "S") : "The task",
    critical ? el("span", { class: `tag ${critical.localized ? "bad" : "mixed"}` },
      critical.localized ? "◀ first irrecoverable step" : "◁ here or later") : null)];
  if (node === 0) {
    for (const message of tree.prompt) parts.push(bubble(message.role, message.role, [el("div", { class: "words" }, message.content)]));
    if (!tree.prompt.length) parts.push(el("div", { class: "dim" }, "This tree has no texts."));
    if (tree.info) parts.push(el("h3", {}, "about the task"), el("pre", { class: "code" }, ...highlighted(tree.info)));
    return parts;
  }
  const relaxed = tree.eps_low[node] > INDEX.eps_low + 1e-9;
  parts.push(el("div", { class: "figures" },
    figure("correct below", `${correct[node]} of ${below[node]}`),
    figure("node reward r", number(tree.node_reward[node], 3), "mean of the direct children's, Eq. 6"),
    figure("branch adv.", signed(tree.branch[node], 3), "against its siblings, Eq. 7"),
    figure("trajectory adv.", signed(tree.trajectory[node], 3), "against all trajectories of the task, Eq. 8 and 9"),
    figure(INDEX.lambda_tree === undefined ? `A (${INDEX.advantage})` : "hierarchical A", signed(tree.advantage[node], 3),
      INDEX.lambda_tree === undefined ? null : `Eq. 10, lambda ${INDEX.lambda_tree}`),
    figure(relaxed ? "clip, relaxed" : "clip bounds",
      `${number(1 - tree.eps_low[node], 3)}–${number(1 + tree.eps_high, 3)}`,
      relaxed ? "the lower bound is relaxed from the irrecoverable step on, Eq. 11" : "of the importance ratio"),
    figure("loss coef. +", small(tree.pos[node]), "sum of weight times positive advantage over its trajectories, for each token"),
    figure("loss coef. −", small(tree.neg[node]), "the same of negative advantages"),
    figure("tokens", `${tree.written[node]} + ${tree.heard[node]}`, "written by the agent + by its environment"),
    figure("weights", `version ${tree.version[node]}`, "pushes of weights to the engine before it was sampled")));
  if (tree.words[node] || tree.call[node] !== null || tokens?.[node]) parts.push(el("h3", {}, "the agent"), said(node, tokens));
  if (tree.response[node]) parts.push(el("h3", {}, "the tool"), el("pre", { class: "out" }, tree.response[node]));
  const ordinal = tree.leafOf.get(node);
  if (ordinal !== undefined) parts.push(verdict(ordinal));
  const others = tree.children[tree.parent[node]].filter((other) => other !== node);
  if (others.length) {
    const alike = alikeTo(tree, node);
    parts.push(el("h3", {}, "instead of it, from the same prefix"),
      el("table", { class: "others" }, el("tbody", {}, [...others]
        .sort((a, b) => correct[b] / (below[b] || 1) - correct[a] / (below[a] || 1))
        .map((other) => el("tr", { onclick: () => choose(other) },
          el("td", { class: tone(correct[other], below[other]) }, `${correct[other]}/${below[other]}`),
          el("td", { class: "text" }, snippet(other) || stepName(other), alike.includes(other) ? el("span", { class: "dim" }, " (alike)") : null))))));
  }
  return parts;
}

function verdict(ordinal) {
  const won = tree.correct[ordinal];
  return el("div", { class: `verdict ${won ? "good" : "bad"}` },
    el("b", {}, `${won ? "✓" : "✗"} trajectory #${ordinal}: `), tree.reason[ordinal] || "",
    el("span", { class: "dim" }, ` (reward ${number(tree.reward[ordinal], 2)}, ended ${NAMES[tree.end[ordinal]] || tree.end[ordinal]})`));
}

function bubble(kind, title, content, attributes = {}) {
  const { more = "", ...rest } = attributes;
  return el("div", { ...rest, class: `bubble ${kind}${more}` }, el("header", {}, title), content);
}

function trajectoryOf(node) {
  const ordinals = tree.under[node];
  const reference = tree.critical.find((found) => found.node === node);
  return ordinals.includes(state.leaf) ? state.leaf : reference ? reference.leaf : ordinals[0];
}

function chatView(tokens) {
  const ordinal = trajectoryOf(state.node);
  const critical = criticalNodes(tree, state.upto);
  const label = (each) => `#${each} ${tree.correct[each] ? "✓" : "✗"} ${tree.reason[each]}`.slice(0, 70);
  const parts = [el("select", {
    "aria-label": "trajectory", style: "width:100%;margin-bottom:10px",
    onchange: (event) => { state.leaf = Number(event.target.value); choose(tree.leaf[state.leaf]); },
  }, tree.leaf.map((_, each) => el("option", { value: each, selected: each === ordinal }, label(each))))];
  for (const message of tree.prompt) parts.push(bubble(message.role, message.role, [el("div", { class: "words" }, message.content)]));
  for (const node of pathTo(tree, tree.leaf[ordinal]).slice(1)) {
    const found = critical.get(node);
    const more = (node === state.node ? " chosen" : "") + (found ? " critical" : "");
    const title = [`assistant · ${stepName(node)} · A ${signed(tree.advantage[node])}`,
      found ? el("b", { class: "bad" }, found.localized ? "◀ first irrecoverable step" : "◁ here or later") : ""];
    parts.push(bubble("assistant", "", said(node, tokens), { more, onclick: () => choose(node) }));
    parts[parts.length - 1].firstChild.replaceChildren(...title);
    if (tree.response[node]) parts.push(bubble("tool", "tool", [el("pre", {}, tree.response[node])]));
  }
  parts.push(verdict(ordinal));
  return parts;
}

// --- keys and events ----------------------------------------------------------------------------

function moveTree(by) {
  const place = shown.indexOf(state.index);
  const next = shown[place < 0 ? 0 : Math.max(0, Math.min(shown.length - 1, place + by))];
  if (next !== undefined && next !== state.index) open(next);
}

function moveStep(by) {
  const rows = visibleRows();
  const place = rows.findIndex((row) => row.node === state.node || (row.together && row.alike.includes(state.node)));
  const next = rows[Math.max(0, Math.min(rows.length - 1, place + by))];
  if (next) choose(next.node);
}

function inward() {
  const row = visibleRows().find((each) => each.node === state.node);
  if (row?.together) toggle(row.node, row.alike);
  else if (folded.has(state.node)) toggle(state.node, null);
  else if (tree.children[state.node].length) choose(groups(tree, state.node)[0][0]);
}

function outward() {
  if (tree.children[state.node].length && !folded.has(state.node)) toggle(state.node, null);
  else if (state.node) choose(tree.parent[state.node]);
}

function see(view) {
  state.view = view;
  drawDetail();
  remember();
}

function heat(value) {
  state.heat = $("heat").value = value;
  drawDetail();
  remember();
}

function criticalNext() {
  const nodes = [...new Set(tree.critical.map((found) => found.node))];
  if (nodes.length) choose(nodes[(nodes.indexOf(state.node) + 1) % nodes.length]);
}

const theme = (dark) => document.documentElement.classList.toggle("dark", dark);

function otherTheme() {
  const dark = theme(!document.documentElement.classList.contains("dark"));
  try { localStorage.setItem("elpo-theme", dark ? "dark" : "light"); } catch { /* not allowed here */ }
}

const KEYS = {
  n: () => moveTree(1), p: () => moveTree(-1),
  j: () => moveStep(1), ArrowDown: () => moveStep(1), k: () => moveStep(-1), ArrowUp: () => moveStep(-1),
  l: inward, ArrowRight: inward, h: outward, ArrowLeft: outward,
  c: criticalNext, " ": play,
  "]": () => { stop(); upTo(state.upto + 1); }, "[": () => { stop(); upTo(state.upto - 1); },
  s: () => see("step"), t: () => see("chat"),
  g: () => heat($("heat").options[($("heat").selectedIndex + 1) % $("heat").options.length].value),
  "/": () => { $("text").focus(); $("text").select(); },
  d: otherTheme,
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const typing = event.target.matches?.("input[type=search], select");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.target.matches?.("button, input") && [" ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(event.key)) return;
  const action = KEYS[event.key];
  if (action) { event.preventDefault(); action(); }
});

let saved = null;
try { saved = localStorage.getItem("elpo-theme"); } catch { /* not allowed here */ }
theme(saved ? saved === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);

$("title").textContent = INDEX.name;
$("about").textContent = [
  plural(COUNT, "tree"), trajectories(T.outcomes.reduce((sum, each) => sum + each.length, 0)),
  `planner ${INDEX.planner}`, `advantage ${INDEX.advantage}`,
].join(" · ");
for (const task of new Set(T.task)) $("tasks").append(el("option", { value: task }));
$("filters").addEventListener("input", () => { $("list").scrollTop = 0; filter(); remember(); });
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("list").addEventListener("scroll", drawList);
$("tab-step").addEventListener("click", () => see("step"));
$("tab-chat").addEventListener("click", () => see("chat"));
$("heat").addEventListener("change", (event) => heat(event.target.value));
$("theme").addEventListener("click", otherTheme);
$("map").addEventListener("click", (event) => {
  const node = event.target.closest("[data-node]");
  if (node) choose(Number(node.dataset.node));
});
$("map").addEventListener("mouseover", (event) => {
  const node = event.target.closest("[data-node]");
  if (!node || node.querySelector("title")) return;
  const at = Number(node.dataset.node), { below, correct } = tree.counts;
  node.prepend(el("title", {}, `${stepName(at)} · ${correct[at]} of ${below[at]} correct\n${snippet(at)}`));
});
$("help").addEventListener("click", KEYS["?"]);
addEventListener("resize", () => { drawList(); if (tree) drawMap(); });
addEventListener("hashchange", recall);
recall().then(() => {
  document.body.dataset.ready = "yes";
  return readTexts();
});
