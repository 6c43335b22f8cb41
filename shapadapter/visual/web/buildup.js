// The curve of cumulative attribution under its slider.

const CURVE = { left: 8, right: 312, top: 16, bottom: 114 };  // inside the drawing; the slider's thumb has a radius of 8

/** Draw the curve through `sums`, with its part up to `added` strong: red where it rises, blue where it falls; it ends at the `goal`. */
function drawCurve(sums, peak, added, goal) {
  const { left, right, top, bottom } = CURVE;
  const low = Math.min(...sums), spread = Math.max(...sums) - low || 1;
  const x = place => left + (right - left) * place / Math.max(sums.length - 1, 1);
  const y = value => bottom - (bottom - top) * (value - low) / spread;
  const path = (from, to) => from >= to ? "" : "M" + sums.slice(from, to + 1)
    .map((value, place) => `${x(from + place).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
  byId("rise").setAttribute("d", path(0, Math.min(peak, added)));
  byId("fall").setAttribute("d", path(peak, added));
  byId("rest").setAttribute("d", path(added, sums.length - 1));
  byId("dot").setAttribute("cx", x(added).toFixed(1));
  byId("dot").setAttribute("cy", y(sums[added]).toFixed(1));
  mark("null", `${EMPTY} ${plain(sums[0])}`, left, y(sums[0]), "start");
  mark("end", `${goal} ${plain(sums[sums.length - 1])}`, right, y(sums[sums.length - 1]), "end");
}

/** A level across the curve with what it means. */
function mark(name, text, x, y, anchor) {
  byId(`${name}-line`).setAttribute("d", `M${CURVE.left} ${y.toFixed(1)}H${CURVE.right}`);
  const label = byId(`${name}-text`);
  label.textContent = text;
  label.setAttribute("x", x);
  label.setAttribute("y", (y + 13).toFixed(1));  // the curve bends downwards: below both ends there is room
  label.setAttribute("text-anchor", anchor);
}

/** What the slider says: the sum so far, and which patch came last. */
function buildText(sums, order, view, added) {
  const players = view.values.length;
  const last = added ? ` The last one: ${placeOf(order[added - 1], view)}, ${signed(view.values[order[added - 1]])}.` : "";
  const end = added === players ? `, the ${view.goal}` : "";
  const text = addingUp([sums[0]], [sums[added]]);
  return `${added} of ${players} patches: ${EMPTY} ${text.start} ${text.down ? MINUS : "+"} ${text.size} = ${text.end}${end}.`
    + (added === players ? "" : last);
}

/** Row and column of a player, from 1. */
const placeOf = (player, { cols }) => `row ${Math.floor(player / cols) + 1}, column ${player % cols + 1}`;
