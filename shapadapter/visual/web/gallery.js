// The list of images: order, filter, search, and walking through it by keyboard.

const list = byId("cards"), cards = [...list.children];
const buttons = cards.map(card => card.querySelector("button"));
const thumbs = cards.map(card => card.querySelector("img"));

/** A small map of the predicted class beside each picture. */
function drawThumbs() {
  data.images.forEach((image, number) => {
    const frame = make("span", "", { class: "thumb faint" });
    const copy = make("img", "", { alt: "" }), canvas = make("canvas", "", { "aria-hidden": "true" });
    copy.src = thumbs[number].src;
    const map = chosenMap(image, 0, -1);
    paint(canvas, map);
    frame.append(copy, canvas, dashes(map));
    thumbs[number].parentElement.after(frame);
    for (const part of [frame, thumbs[number].parentElement]) {
      part.style.width = `${3.7 * Math.min(image.width / image.height, 1)}rem`;
    }
    cards[number].querySelector(".gap").textContent = data.sums ? `gap ${plain(image.gap)}` : "";
    if (Math.max(image.width, image.height) < 128) cards[number].classList.add("small");
  });
}

const ORDERS = {
  given: () => 0,
  wrong: image => image.right === false ? 0 : image.right === null ? 1 : 2,
  confidence: image => image.confidence ?? 2,
  gap: image => -image.gap,
};

/** Put the cards in order and hide those that are not asked for; the shown image stays if it can. */
function arrange() {
  const wish = byId("order").value, only = byId("only").value, text = byId("find").value.trim().toLowerCase();
  const numbers = data.images.map((_, number) => number);
  const key = number => ORDERS[wish](data.images[number]);
  numbers.sort((a, b) => (wish === "class"
    ? data.images[a].predicted.localeCompare(data.images[b].predicted) : key(a) - key(b)) || a - b);
  list.append(...numbers.map(number => cards[number]));
  list.dataset.order = wish;
  numbers.forEach(number => {
    const { name, predicted, true: label } = data.images[number];
    const asked = !only || predicted === only || label === only;
    const found = [name, predicted, label ?? ""].some(words => words.toLowerCase().includes(text));
    cards[number].hidden = !(asked && found);
  });
  const left = visible();
  const wrong = left.filter(number => data.images[number].right === false).length;
  const known = left.some(number => data.images[number].right !== null);
  byId("count").textContent = `${left.length} of ${plural(cards.length, "image")}${known ? `, ${wrong} wrong` : ""}`;
  reach();
}

/** The numbers of the images in the gallery, in its order. */
const visible = () => [...list.children].filter(card => !card.hidden).map(card => cards.indexOf(card));

/** One card can be reached by Tab: the shown one, else the first. */
function reach() {
  const left = visible(), here = left.indexOf(state.image);
  buttons.forEach((button, number) => {
    button.tabIndex = number === (here < 0 ? left[0] : state.image) ? 0 : -1;
    if (number === state.image) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  byId("before").disabled = here <= 0;
  byId("after").disabled = here === left.length - 1 || !left.length;
  document.querySelector(".steps").hidden = cards.length === 1;
}

function openImage(number) {
  showImage(number);
  reach();
  const box = list.getBoundingClientRect(), card = cards[number].getBoundingClientRect();
  list.scrollTop += card.top < box.top ? card.top - box.top : Math.max(card.bottom - box.bottom, 0);
  list.scrollLeft += card.left < box.left ? card.left - box.left : Math.max(card.right - box.right, 0);
}

/** The image before or after the shown one, as the gallery has them. */
function step(by) {
  const left = visible(), next = left[left.indexOf(state.image) + by];
  if (next !== undefined) openImage(next);
}

function walkCards(event) {
  const left = visible(), here = left.indexOf(buttons.indexOf(event.target));
  const goal = { ArrowUp: here - 1, ArrowLeft: here - 1, ArrowDown: here + 1, ArrowRight: here + 1, Home: 0, End: left.length - 1 }[event.key];
  if (here < 0 || goal === undefined) return;
  event.preventDefault();
  if (left[goal] === undefined) return;
  openImage(left[goal]);
  buttons[left[goal]].focus();
}

function fillClasses() {
  const names = new Set(data.images.flatMap(image => [image.predicted, ...(image.true === null ? [] : [image.true])]));
  byId("only").append(...[...names].sort((a, b) => a.localeCompare(b)).map(name => new Option(name, name)));
}
