// The opacity slider and the tooltip with the region's name. `element` is the gradio component.
const maps = new WeakMap();
let opacity = 50;

function show(value) {
  opacity = value;
  element.style.setProperty("--opacity", value / 100);
  for (const label of element.querySelectorAll(".opacity")) {
    label.querySelector("input").value = value;
    label.querySelector("output").textContent = `${value} %`;
  }
}

function pixelsOf(map) {
  if (!maps.has(map)) {
    const canvas = document.createElement("canvas");
    canvas.width = map.naturalWidth;
    canvas.height = map.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(map, 0, 0);
    maps.set(map, context.getImageData(0, 0, canvas.width, canvas.height));
  }
  return maps.get(map);
}

function nameAt(stack, x, y) {
  const map = stack.querySelector(".map");
  if (!map || !map.complete || !map.naturalWidth) return "";
  const { data, width, height } = pixelsOf(map);
  const column = Math.min(width - 1, Math.max(0, Math.floor(x * width)));
  const row = Math.min(height - 1, Math.max(0, Math.floor(y * height)));
  const at = 4 * (row * width + column);
  const name = JSON.parse(stack.dataset.names)[data[at] + 256 * data[at + 1] - 1];
  if (name === undefined) return "";
  const known = "confidence" in stack.dataset;
  return known ? `${name} · ${Math.round(data[at + 2] / 2.55)} %` : name;
}

function follow(event) {
  const stack = event.target.closest ? event.target.closest(".stack") : null;
  for (const tip of element.querySelectorAll(".tip")) tip.hidden = true;
  if (!stack) return;
  const box = stack.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width;
  const y = (event.clientY - box.top) / box.height;
  const tip = stack.querySelector(".tip");
  tip.textContent = nameAt(stack, x, y);
  tip.hidden = !tip.textContent;
  tip.style.left = `${100 * x}%`;
  tip.style.top = `${100 * y}%`;
  // To the side on which there is more room, and above the finger.
  tip.style.transform = `translate(${x > 0.5 ? "calc(-100% - 10px)" : "10px"}, ${y > 0.2 ? "-130%" : "60%"})`;
}

element.addEventListener("input", (event) => {
  if (event.target.closest(".opacity")) show(Number(event.target.value));
});
element.addEventListener("pointermove", follow);
element.addEventListener("pointerdown", follow);
element.addEventListener("pointerleave", follow);
// A new answer: load events do not bubble, but can be captured.
element.addEventListener("load", (event) => {
  maps.delete(event.target);
  show(opacity);
}, true);
