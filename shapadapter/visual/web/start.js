// Light and dark, and what happens when something is touched.

const THEMES = ["", "light", "dark"], SAID = { "": "system", light: "light", dark: "dark" };
const contrast = matchMedia("(prefers-contrast: more)");

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").textContent = `Theme: ${SAID[theme]}`;
}

/** Mark the signs for those who cannot tell red from blue; a print does so by itself. */
function setSigns(shown) {
  byId("signs").checked = shown;
  document.querySelector("main").classList.toggle("signs", shown);
}

const at = event => cells.indexOf(event.target.closest("[role=gridcell]"));

function listen() {
  const map = byId("map");
  map.addEventListener("pointerover", event => { if (at(event) >= 0) read(at(event)); });
  map.addEventListener("pointerleave", () => read(state.held));
  for (const name of ["click", "focusin"]) map.addEventListener(name, event => { if (at(event) >= 0) hold(at(event)); });
  map.addEventListener("keydown", walk);
  for (const id of ["strongest", "added"]) {
    byId(id).addEventListener("input", event => {
      state[id] = Number(event.target.value);
      slide();
    });
  }
  byId("signs").addEventListener("change", event => setSigns(event.target.checked));
  byId("other").addEventListener("change", event => {
    state.other = Number(event.target.value);
    showMap(true);
  });
  byId("order").addEventListener("change", () => {
    arrange();
    if (visible().length) openImage(visible()[0]);
  });
  for (const [id, name] of [["only", "change"], ["find", "input"]]) {
    byId(id).addEventListener(name, () => {
      arrange();
      if (visible().length && !visible().includes(state.image)) openImage(visible()[0]);
    });
  }
  list.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (button) openImage(buttons.indexOf(button));
  });
  list.addEventListener("keydown", walkCards);
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
  byId("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "") + 1) % THEMES.length]);
  });
}

for (const hue of ["red", "blue"]) document.documentElement.style.setProperty(`--${hue}`, `rgb(${data[hue]})`);
drawThumbs();
fillClasses();
arrange();
listen();
setTheme("");
setSigns(contrast.matches);
contrast.addEventListener("change", () => setSigns(contrast.matches));
byId("theme").hidden = false;
openImage(visible()[0]);
