// The image that is shown large: its classes, its map, and the two sliders.

const UNIT = byId("unit").textContent;
const state = { image: 0, place: 0, other: -1, strongest: 100, added: 0, held: null };
let view, sums, order, cells = [];

const current = () => data.images[state.image];

/** Show another image, from its likeliest class. */
function showImage(number) {
  Object.assign(state, { image: number, place: 0, other: -1, held: null });
  const image = current(), source = thumbs[number];
  for (const id of ["picture", "faint"]) byId(id).src = source.src;
  byId("picture").alt = source.alt;
  byId("heading").textContent = image.name ? `${number + 1}. ${image.name}` : `Image ${number + 1}`;
  verdict(image);
  const small = Math.max(image.width, image.height) < 128;
  document.querySelectorAll("#inspector .frame").forEach(frame => {
    frame.style.aspectRatio = `${image.width} / ${image.height}`;
    frame.style.maxWidth = `${75 * image.width / image.height}vh`;  // a tall one fits the window
    frame.classList.toggle("small", small);
  });
  byId("what").textContent = image.confidence === null ? "Value" : "p";
  listClasses(image);
  buildCells(image.classes[0].values.length, image.classes[0].values[0].length);
  byId("added").max = cells.length;
  showMap(true);
}

function verdict({ predicted, stands, right, true: label }) {
  const line = byId("verdict");
  line.textContent = `Predicted ${predicted} (${stands}). `;
  if (right !== null) line.append(make("span", right ? "\u2713 right" : `\u2717 wrong: it is ${label}`, { class: right ? "right" : "wrong" }));
}

/** A row for each class, with a radio button, and the choice of what to contrast with. */
function listClasses(image) {
  byId("rows").replaceChildren(...image.classes.map((one, place) => {
    const row = make("tr"), label = make("label");
    const radio = make("input", "", { type: "radio", name: "class", value: place });
    radio.addEventListener("change", () => choose(place));
    label.append(radio, make("span", one.label));
    const head = make("th", "", { scope: "row" });
    head.append(label);
    if (one.true) head.append(make("small", "\u2713 true class"));
    row.append(head, make("td", one.probability.split("=")[1]));
    if (data.sums) row.append(make("td", plain(one.logit)));
    const value = make("td", "", { class: "value" });
    value.append(make("span", "\u2013"), make("small"), make("i"));
    row.append(value);
    return row;
  }));
  const select = byId("other");
  select.replaceChildren(new Option("no other class", -1), ...image.classes.map((one, place) => new Option(one.label, place)));
  select.parentElement.hidden = image.classes.length < 2;
}

function choose(place) {
  if (state.other === place) state.other = -1;
  state.place = place;
  showMap(true);
}

/** Cells to point at and to walk through; the colors are on a canvas below them. */
function buildCells(rows, cols) {
  const map = byId("map");
  map.replaceChildren();
  map.style.fontSize = `${70 / cols}cqw`;
  map.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${cols}, 1fr)`;
  cells = Array.from({ length: rows }, () => {
    const line = map.appendChild(make("div", "", { role: "row" }));
    return Array.from({ length: cols }, () => line.appendChild(make("div", "", { role: "gridcell", tabindex: "-1" })));
  }).flat();
  cells[0].tabIndex = 0;
}

/** Draw the chosen map. With `whole` all patches are added again, for their order is another one. */
function showMap(whole) {
  view = chosenMap(current(), state.place, state.other);
  order = ranked(view.values, value => value);
  sums = cumulative(view.null, view.values, order);
  if (whole) state.added = cells.length;
  byId("rows").querySelectorAll("input").forEach((radio, place) => { radio.checked = place === state.place; });
  byId("other").value = state.other;
  [...byId("other").options].forEach(option => { option.disabled = Number(option.value) === state.place; });
  byId("shown").textContent = `${view.label}${view.total ? `, ${view.total}` : ""}`;
  byId("check").textContent = view.check;
  byId("unit").textContent = state.other < 0 ? UNIT : `${UNIT}, of the one class minus that of the other`;
  byId("map").setAttribute("aria-label", `What each patch says for ${view.label}${view.total ? `, ${view.total}` : ""}`);
  const [low, , high] = document.querySelector(".ticks").children;
  low.textContent = view.limit ? plain(-view.limit) : "0";
  high.textContent = view.limit ? signed(view.limit) : "0";
  document.querySelector(".bar").setAttribute("aria-label",
    `Colour scale from ${low.textContent}, blue, over 0, transparent, to ${high.textContent}, red`);
  cells.forEach((cell, player) => {
    const spread = view.errors ? ` ${within(view.errors[player])}` : "";
    const value = view.values[player];
    cell.dataset.sign = Math.abs(value) < data.worth * view.limit || value === 0 ? "" : value > 0 ? "+" : MINUS;
    cell.setAttribute("aria-label", `${placeOf(player, view)}: ${exact(value)}${spread}`);
  });
  slide();
  read(state.held);
}

/** Draw what depends on the sliders. */
function slide() {
  const players = cells.length, size = ranked(view.values, Math.abs);
  const count = Math.max(1, Math.round(players * state.strongest / 100));
  const strong = new Set(size.slice(0, count)), present = new Set(order.slice(0, state.added));
  const both = new Set([...strong].filter(player => present.has(player)));
  paint(byId("colors"), view, both);
  cells.forEach((cell, player) => cell.classList.toggle("off", !both.has(player)));
  cover(byId("veil"), view, present);
  const contour = byId("contour"), path = count < players ? outline(strong, view.rows, view.cols) : "";
  contour.setAttribute("viewBox", `0 0 ${view.cols} ${view.rows}`);
  for (const line of contour.children) line.setAttribute("d", path);
  const all = sum(view.values.map(Math.abs)), part = sum([...strong].map(player => Math.abs(view.values[player])));
  const share = all ? Math.round(100 * part / all) : 0;
  byId("strongest").value = state.strongest;
  byId("strongest-text").textContent = count === players ? "All patches are shown."
    : `${state.strongest} %, ${count} of ${players} patches, outlined: they hold ${share} % of the size of all attributions, `
      + `and sum to ${signed(sum([...strong].map(player => view.values[player])))}.`;
  byId("strongest").setAttribute("aria-valuetext", `${state.strongest} %, ${count} patches holding ${share} %`);
  byId("added").value = state.added;
  byId("added-text").textContent = buildText(sums, order, view, state.added);
  byId("added").setAttribute("aria-valuetext", `${state.added} of ${players} patches: ${plain(sums[state.added])}`);
  drawCurve(sums, order.filter(player => view.values[player] > 0).length, state.added, view.goal);
  byId("build-title").textContent = `How the ${view.goal} builds up`;
}

/** Say what a patch gives each class; null says how to find out. */
function read(player) {
  const image = current();
  cells.forEach((cell, other) => cell.classList.toggle("read", other === player));
  const where = player === null ? "" : placeOf(player, view);
  byId("place").parentElement.classList.toggle("unread", player === null);
  byId("place").textContent = player === null
    ? `Point at a patch for its values${image.classes[0].errors ? " \u00b1 standard error" : ""}, or move with the arrow keys.`
    : `${where[0].toUpperCase()}${where.slice(1)}${state.other < 0 ? "" : `: ${view.label} ${exact(view.values[player])}`}`;
  [...byId("rows").children].forEach((row, place) => {
    const { values, errors } = image.classes[place], [text, spread, bar] = row.lastChild.children;
    row.classList.toggle("chosen", place === state.place);
    const spot = player === null ? null : [Math.floor(player / view.cols), player % view.cols];
    const value = spot ? values[spot[0]][spot[1]] : 0;
    text.textContent = spot ? exact(value) : "\u2013";
    spread.textContent = spot && errors ? within(errors[spot[0]][spot[1]]) : "";
    bar.className = value > 0 ? "for" : "against";
    bar.style.width = `${image.limit ? 50 * Math.min(Math.abs(value) / image.limit, 1) : 0}%`;
  });
}

/** Walk through the map from the cell that has the focus. */
function walk(event) {
  const here = cells.indexOf(event.target), { rows, cols } = view;
  const row = Math.floor(here / cols), col = here % cols;
  const goal = {
    ArrowUp: [row - 1, col], ArrowDown: [row + 1, col], ArrowLeft: [row, col - 1], ArrowRight: [row, col + 1],
    Home: [row, 0], End: [row, cols - 1],
  }[event.key];
  if (here < 0 || !goal) return;
  event.preventDefault();
  if (goal[0] >= 0 && goal[1] >= 0 && goal[0] < rows && goal[1] < cols) cells[goal[0] * cols + goal[1]].focus();
}

/** Keep a patch that was tapped or walked to, when the pointer leaves. */
function hold(player) {
  cells.forEach((cell, other) => { cell.tabIndex = other === player ? 0 : -1; });
  state.held = player;
  read(player);
}
