// Drawing maps: one pixel of a canvas for each patch, enlarged by the browser without smoothing.

/** Colour the signed values of `rows` x `cols` players; those that are not in `shown`, a set, stay transparent. */
function paint(canvas, { rows, cols, values, limit }, shown = null) {
  const pixels = new ImageData(cols, rows);
  values.forEach((value, player) => {
    const strength = limit > 0 ? Math.min(Math.abs(value) / limit, 1) : 0;
    const opacity = shown === null || shown.has(player) ? Math.round(255 * strength) : 0;
    pixels.data.set([...(value > 0 ? data.red : data.blue), opacity], 4 * player);
  });
  put(canvas, pixels);
}

/** Cover the players of a picture that are not in `shown`. */
function cover(canvas, { rows, cols, values }, shown) {
  const pixels = new ImageData(cols, rows);
  values.forEach((_, player) => pixels.data.set([128, 132, 140, shown.has(player) ? 0 : 225], 4 * player));
  put(canvas, pixels);
}

function put(canvas, pixels) {
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** The outline of a set of players as a path in units of players. */
function outline(inside, rows, cols) {
  const has = (row, col) => row >= 0 && col >= 0 && row < rows && col < cols && inside.has(row * cols + col);
  let path = "";
  for (let row = 0; row <= rows; row += 1) {
    for (let col = 0; col <= cols; col += 1) {
      if (has(row, col) !== has(row - 1, col)) path += `M${col} ${row}h1`;
      if (has(row, col) !== has(row, col - 1)) path += `M${col} ${row}v1`;
    }
  }
  return path;
}

/** A dash on each player that clearly speaks against, as in figures: where there is no color, red and blue are alike. */
function dashes({ rows, cols, values, limit }) {
  const drawn = values.map((value, player) => value < -data.worth * limit
    ? `M${(player % cols + 0.32).toFixed(2)} ${Math.floor(player / cols) + 0.5}h.36` : "").join("");
  const [svg, path] = ["svg", "path"].map(tag => document.createElementNS(byId("contour").namespaceURI, tag));
  svg.setAttribute("viewBox", `0 0 ${cols} ${rows}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", drawn);
  svg.append(path);
  return svg;
}

/** A new element with text in it; text never becomes markup. */
function make(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
