// One line across all charts: the step under the pointer, or chosen with the arrow keys, and every curve's value there.
"use strict";
const charts = JSON.parse(document.getElementById("data").textContent).map((data) => {
  const plot = document.querySelector(`[data-chart="${CSS.escape(data.key)}"]`);
  const figure = plot.closest("figure");
  const outputs = [...figure.querySelectorAll(".legend b")];
  const chart = { ...data, plot, outputs, texts: outputs.map((output) => output.textContent), cross: plot.querySelector(".cross"), at: plot.querySelector(".at") };
  chart.steps = [...new Set(data.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  return chart;
});

function figureText(value, unit) {
  if (typeof value !== "number") return value;
  if (unit === "share") return `${+(100 * value).toPrecision(3)} %`;
  if (unit === "bytes") return `${+(value / 2 ** 30).toPrecision(3)} GiB`;
  if (unit === "count" && Math.abs(value) >= 1000) {
    const [size, name] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]].find(([size]) => Math.abs(value) >= size);
    return `${(value / size).toFixed(1)} ${name}`;
  }
  if (value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(2).replace("+", "");
  return Math.abs(value) < 1e-2 ? String(+value.toPrecision(3)) : String(+value.toPrecision(4));
}

// The place of the last step that is not beyond the one asked for, or of the first one.
function placeOf(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1; else high = middle;
  }
  return Math.max(0, low - 1);
}

function nearest(steps, step) {
  const place = placeOf(steps, step);
  return place + 1 < steps.length && steps[place + 1] - step < step - steps[place] ? place + 1 : place;
}

function show(step) {
  for (const chart of charts) {
    const share = Math.min(1, (step - chart.first) / Math.max(1, chart.last - chart.first));
    chart.cross.hidden = chart.at.hidden = share < 0;
    if (share < 0) { chart.outputs.forEach((output, number) => { output.textContent = chart.texts[number]; }); continue; }
    chart.cross.style.left = `${100 * share}%`;
    chart.at.style.left = `clamp(1.5rem, ${100 * share}%, calc(100% - 1.5rem))`;
    chart.at.textContent = `step ${step.toLocaleString("en")}`;
    const said = chart.lines.map((line, number) => {
      const steps = line.steps;
      const inside = step >= steps[0] && step <= steps[steps.length - 1];
      // Beyond a curve's end there is nothing, but a little before its first record stands that record.
      const text = inside || step < steps[0] ? figureText(line.values[nearest(steps, step)], chart.unit) : "–";
      chart.outputs[number].textContent = text;
      return `${line.label} ${text}`;
    });
    chart.plot.setAttribute("aria-valuenow", step);
    chart.plot.setAttribute("aria-valuetext", `step ${step}: ${said.join(", ")}`);
  }
}

function rest() {
  for (const chart of charts) {
    chart.cross.hidden = chart.at.hidden = true;
    chart.outputs.forEach((output, number) => { output.textContent = chart.texts[number]; });
  }
}

for (const chart of charts) {
  const { plot, steps } = chart;
  let chosen = steps.length - 1;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-valuemin", steps[0]);
  plot.setAttribute("aria-valuemax", steps[steps.length - 1]);
  plot.setAttribute("aria-valuenow", steps[chosen]);
  plot.setAttribute("aria-valuetext", plot.getAttribute("aria-description"));
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    chosen = nearest(steps, chart.first + ((event.clientX - box.left) / box.width) * (chart.last - chart.first));
    show(steps[chosen]);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", (event) => { if (!plot.matches(":focus-visible")) rest(); });
  plot.addEventListener("blur", rest);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(steps[chosen]); });
  plot.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") { rest(); return; }
    if (!(event.key in moves)) return;
    event.preventDefault();
    chosen = Math.min(steps.length - 1, Math.max(0, chosen + moves[event.key]));
    show(steps[chosen]);
  });
}
