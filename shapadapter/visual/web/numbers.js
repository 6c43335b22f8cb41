"use strict";

// Numbers of the page and how they are written. Nothing here touches what is shown.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const MINUS = "\u2212", EMPTY = "v(\u2205)";

/** A number for people: two decimals where they say something, else two digits and an exponent. */
function plain(value) {
  const size = Math.abs(value), short = size === 0 || (size >= 0.01 && size < 1e5);
  return (value < 0 ? MINUS : "") + (short ? size.toFixed(2) : size.toExponential(1).replace(/e([-+])(\d)$/, "e$10$2").replace("-", MINUS));
}

/** A start, what is added and where it ends, so that the printed numbers add up, as `adding_up` writes them in figures. */
function addingUp(starts, ends) {
  const largest = Math.max(...starts.concat(ends).map(Math.abs), Math.abs(minus(ends) - minus(starts)));
  const power = largest === 0 || (largest >= 0.01 && largest < 1e5) ? 0 : Math.floor(Math.log10(largest));
  const places = power ? 1 : 2, unit = 10 ** (power - places);
  const units = values => minus(values.map(value => Math.round(value / unit)));
  const tail = power ? `e${power < 0 ? MINUS : "+"}${String(Math.abs(power)).padStart(2, "0")}` : "";
  const text = (count, plus = "") => (count < 0 ? MINUS : plus) + (Math.abs(count) / 10 ** places).toFixed(places) + tail;
  const start = units(starts), end = units(ends);
  return { start: text(start), added: text(end - start, "+"), size: text(Math.abs(end - start)), end: text(end), down: end < start };
}
const minus = ([first, second = 0]) => first - second;

/** The same with its sign. */
const signed = value => (value < 0 ? "" : "+") + plain(value);

/** The value of a patch, to three digits. */
const exact = value => (value < 0 ? MINUS : "+") + Math.abs(value).toPrecision(3).replace("-", MINUS);

/** Its standard error. */
const within = error => `\u00b1 ${error.toPrecision(2).replace("-", MINUS)}`;

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const sum = values => values.reduce((total, value) => total + value, 0);

/** The map of a class of an image, or of one class minus another, `other` being -1 without. */
function chosenMap(image, place, other) {
  const one = image.classes[place], rows = one.values.length, cols = one.values[0].length;
  const values = one.values.flat(), errors = one.errors ? one.errors.flat() : null;
  const alone = {
    rows, cols, values, errors, limit: image.limit, null: one.null, logit: one.logit, check: one.check,
    label: one.label, total: one.total, goal: "logit",
  };
  if (other < 0) return alone;
  const against = image.classes[other], others = against.values.flat();
  const difference = values.map((value, player) => value - others[player]);
  const start = one.null - against.null, end = one.logit - against.logit;
  const text = addingUp([one.null, against.null], [one.logit, against.logit]);
  return {
    ...alone,
    values: difference,
    errors: null,  // the errors of two classes are not independent, and how they go together is not known
    limit: Math.max(...difference.map(Math.abs)),
    null: start,
    logit: end,
    goal: "difference of the logits",
    label: `${one.label} ${MINUS} ${against.label}`,
    total: `\u03a3\u03c6=${data.sums ? text.added : signed(sum(difference))}`,
    check: data.sums ? `${EMPTY} ${text.start} + \u03a3\u03c6 ${text.added} = ${text.end}\n`
      + `(difference of the logits ${text.end})` : "",
  };
}

/** The players of values by size of `key`, largest first; equal ones in their order. */
const ranked = (values, key) => values.map((_, player) => player).sort((a, b) => key(values[b]) - key(values[a]) || a - b);

/** What v(empty) and the attributions add up to, after 0, 1, ... players in this order. */
function cumulative(start, values, order) {
  const sums = [start];
  for (const player of order) sums.push(sums[sums.length - 1] + values[player]);
  return sums;
}
