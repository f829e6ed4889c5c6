"use strict";
// Draws the page's curves from the JSON that it carries. Nothing is fetched.

const runs = JSON.parse(document.getElementById("data").textContent).runs;
const view = { x: "step", logX: false, logY: false, smoothing: 0, run: 0, map: null };
const COLORS = ["#2f7ed8", "#e4572e", "#17a673", "#b05cc6", "#d9a404", "#00a7b5", "#9c7a50",
  "#7f8790", "#d6497f", "#6b8e23"];
const PHASE_COLORS = {
  "initialization": "#8c8c8c", "data preparation": "#b5a7d6", "restore": "#6f9fd8",
  "compilation": "#5b5ea6", "data wait": "#e0b13c", "step": "#2e8b57", "evaluation": "#74c2a8",
  "save blocked": "#c97b4a", "sampling": "#9c6b98", "idle": "#b9bec5", "lost": "#d64545",
  "down": "#5a5a5a" };
const TITLES = {
  loss: "Loss (nats per token)", bits_per_byte: "Bits per byte", gradient_norm: "Gradient norm",
  learning_rate: "Learning rate", tokens_per_second: "Tokens per second", mfu: "MFU",
  loss_scale: "Loss scale", skipped: "Skipped updates", cross_entropy: "Cross-entropy" };
const ORDER = ["loss", "bits_per_byte", "gradient_norm", "learning_rate", "tokens_per_second", "mfu"];
const LINEAR_MAPS = ["attention entropy", "silent units", "idle experts", "busiest expert",
  "spread over experts"];
const touch = matchMedia("(pointer: coarse)").matches;
const plots = [];  // {element, draw}; draw() returns [traces, layout].
let following = false;

// Plotly reads a few tags in its texts: a name is to be shown as it is.
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const ink = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The horizontal places of steps: themselves, or tokens or seconds by linear interpolation. */
function places(run, steps) {
  if (view.x === "step") return steps;
  const known = run[view.x], unit = view.x === "seconds" ? timeUnit()[1] : 1;
  const xs = [0, ...known.step], ys = [0, ...known.value];
  return steps.map(step => {
    let low = 0, high = xs.length - 1;
    if (high === 0) return null;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= step) low = middle; else high = middle;
    }
    const share = xs[high] === xs[low] ? 1 : (step - xs[low]) / (xs[high] - xs[low]);
    // Beyond what the ledger has booked, the last known pace goes on.
    return (ys[low] + share * (ys[high] - ys[low])) / unit;
  });
}

function timeUnit() {
  const longest = Math.max(1, ...runs.map(run => run.seconds.value.at(-1) ?? 0));
  return longest > 7200 ? ["hours", 3600] : longest > 120 ? ["minutes", 60] : ["seconds", 1];
}

const axisTitle = () => view.x === "seconds" ? `${timeUnit()[0]} since the first start` :
  view.x === "tokens" ? "tokens" : "step";

/** An exponential moving average, corrected for its start; what is missing stays missing. */
function smoothedValues(values, weight) {
  let sum = 0, norm = 0;
  return values.map(value => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + 1 - weight;
    return sum / norm;
  });
}

function line(run, curve, name, color, style) {
  return {
    type: "scatter", mode: "lines", x: places(run, curve.step), y: curve.value, name: plain(name),
    line: { color, width: 1.6 }, hovertemplate: "%{y:.5~g}", ...style };
}

/** The traces of one metric of one run. */
function traces(run, index, metric) {
  const many = runs.length > 1, color = COLORS[index % COLORS.length];
  const train = run.curves[`train/${metric}`], held = run.curves[`validation/${metric}`];
  const group = `run ${index}`, found = [];
  const label = what => many ? `${run.name}, ${what}` : what;
  if (train) {
    const weight = view.smoothing / 100;
    const strong = weight > 0 ? { step: train.step, value: smoothedValues(train.value, weight) } :
      run.curves[`train/${metric} smoothed`];
    if (strong && !many) {
      found.push(line(run, train, "training, each step", color, {
        opacity: 0.35, line: { color, width: 1 }, hoverinfo: "skip", hovertemplate: null }));
    }
    found.push(line(run, strong || train, label(strong ? "training, smoothed" : "training"), color, {
      legendgroup: group, name: plain(many ? run.name : strong ? "training, smoothed" : "training"),
      line: { color, width: strong ? 2.2 : 1.4 } }));
  }
  if (held) {
    const accent = many ? color : COLORS[1];
    found.push(line(run, held, label("validation"), accent, {
      mode: "lines+markers", marker: { color: accent, size: 6, symbol: many ? "diamond" : "circle" },
      line: { color: accent, width: 1.4, dash: many ? "dot" : "solid" },
      legendgroup: group, showlegend: !many || !train }));
  }
  return metric === "loss" ? found.concat(notes(run, color, index)) : found;
}

/** The last evaluation of the whole validation split, and where something was found. */
function notes(run, color, index) {
  const found = [], many = runs.length > 1;
  if (run.measured && run.measured.loss !== null) {
    found.push({
      type: "scatter", mode: "markers", x: places(run, [run.measured.step]), y: [run.measured.loss],
      name: "whole validation split", marker: { symbol: "star", size: 12, color: many ? color : COLORS[4],
        line: { width: 1, color: ink("panel") } },
      hovertemplate: "%{y:.5~g}", legendgroup: many ? `run ${index}` : undefined, showlegend: !many });
  }
  const losses = run.curves["train/loss"];
  if (run.findings.length && losses) {
    const near = step => {
      let best = 0;
      losses.step.forEach((each, at) => {
        if (Math.abs(each - step) < Math.abs(losses.step[best] - step)) best = at;
      });
      return losses.value[best];
    };
    found.push({
      type: "scatter", mode: "markers", x: places(run, run.findings.map(each => each.step)),
      y: run.findings.map(each => near(each.step)), text: run.findings.map(each => plain(each.kind)),
      name: many ? plain(`${run.name}, findings`) : "findings", hovertemplate: "%{text}",
      marker: { symbol: "triangle-down", size: 11, color: ink("bad") },
      legendgroup: many ? `run ${index}` : undefined, showlegend: !many });
  }
  return found;
}

function layout(changes) {
  const axis = { gridcolor: ink("grid"), zeroline: false, linecolor: ink("line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink("ink"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 48, r: 12, t: touch ? 30 : 8, b: 36 }, hovermode: "x unified",
    hoverlabel: { bgcolor: ink("panel"), bordercolor: ink("line"), font: { color: ink("ink") } },
    dragmode: touch ? false : "zoom", uirevision: `${view.x} ${view.logX} ${view.logY}`,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: ink("soft"), activecolor: ink("accent") },
    // On a phone the buttons are above the curves.
    legend: { orientation: "h", x: 0, font: { size: 11 },
      ...(innerWidth < 800 ? { y: -0.3, yanchor: "top" } : { y: 1.02, yanchor: "bottom" }) },
    xaxis: { ...axis, title: { text: axisTitle(), standoff: 6 }, type: view.logX ? "log" : "linear",
      hoverformat: ".6~g", exponentformat: "SI" },
    yaxis: { ...axis, type: view.logY ? "log" : "linear" }, ...changes };
}

function metricPlot(metric) {
  const drawn = runs.flatMap((run, index) => traces(run, index, metric));
  const shown = layout({ showlegend: drawn.length > 1 });
  if (metric === "mfu" || metric === "skipped") shown.yaxis.tickformat = metric === "mfu" ? ".1~%" : "";
  return [drawn, shown];
}

/** The heat map that was chosen; norms by their logarithm, with the number itself on hover. */
function layerPlot() {
  const run = runs[view.run], map = run.layers.maps[view.map];
  if (!map) return [[], layout({})];
  const linear = LINEAR_MAPS.includes(view.map);
  const z = linear ? map.z : map.z.map(row => row.map(
    value => value === null || value <= 0 ? null : Math.log10(value)));
  const shown = layout({
    hovermode: "closest", showlegend: false, margin: { l: 48, r: 12, t: 30, b: 36 } });
  shown.yaxis = { type: "category", autorange: "reversed", automargin: true, gridcolor: ink("grid"),
    tickfont: { size: 11 } };
  return [[{
    type: "heatmap", x: places(run, run.layers.step), y: map.rows.map(plain), z, customdata: map.z,
    colorscale: "Viridis", hoverongaps: false,
    hovertemplate: `%{y}, ${axisTitle()} %{x}: %{customdata:.3~g}<extra></extra>`,
    colorbar: { thickness: 12, outlinewidth: 0, title: { text: linear ? "" : "log₁₀", side: "top" } },
  }], shown];
}

function timelinePlot() {
  const run = runs[0], byPhase = new Map();
  for (const [begin, end, phase] of run.intervals) {
    if (!byPhase.has(phase)) byPhase.set(phase, []);
    byPhase.get(phase).push([begin, end]);
  }
  const last = run.intervals.length ? run.intervals.at(-1)[1] : 1;
  const [name, size] = last > 7200 ? ["hours", 3600] : last > 120 ? ["minutes", 60] : ["seconds", 1];
  const bars = [...byPhase].map(([phase, spans]) => ({
    type: "bar", orientation: "h", name: plain(phase), y: spans.map(() => ""),
    x: spans.map(([begin, end]) => (end - begin) / size), base: spans.map(([begin]) => begin / size),
    marker: { color: PHASE_COLORS[phase] || "#888", line: { width: 0 } },
    customdata: spans.map(([begin, end]) => end - begin),
    hovertemplate: "%{customdata:.1f} s<extra>" + plain(phase) + "</extra>" }));
  const shown = layout({
    barmode: "overlay", bargap: 0.15, hovermode: "closest", margin: { l: 12, r: 12, t: 30, b: 36 } });
  shown.xaxis = { ...shown.xaxis, type: "linear", title: { text: `${name} since the first start` } };
  shown.yaxis = { visible: false, fixedrange: true };
  shown.legend = { ...shown.legend, traceorder: "normal", y: -0.9, yanchor: "top" };
  shown.shapes = run.starts.slice(1).map(start => ({
    type: "line", x0: start / size, x1: start / size, y0: 0, y1: 1, yref: "paper",
    line: { color: ink("ink"), width: 1, dash: "dot" } }));
  return [bars, shown];
}

const options = {
  responsive: true, displaylogo: false, displayModeBar: touch ? true : "hover",
  modeBarButtons: [touch ? ["zoomIn2d", "zoomOut2d", "resetScale2d"] :
    ["zoom2d", "pan2d", "resetScale2d", "toImage"]],
};

function drawAll() {
  for (const { element, draw } of plots) {
    const [drawn, shown] = draw();
    Plotly.react(element, drawn, shown, options);
  }
}

/** Curves show the same stretch of the run: what one is zoomed to, the others follow. */
function follow(source, change) {
  if (following) return;
  const range = change["xaxis.range[0]"] !== undefined ?
    { "xaxis.range": [change["xaxis.range[0]"], change["xaxis.range[1]"]] } :
    change["xaxis.range"] ? { "xaxis.range": change["xaxis.range"] } :
    change["xaxis.autorange"] ? { "xaxis.autorange": true } : null;
  if (!range) return;
  following = true;
  Promise.all(plots.filter(each => each.follows && each.element !== source)
    .map(each => Plotly.relayout(each.element, range))).finally(() => { following = false; });
}

function addPlot(element, draw, follows) {
  plots.push({ element, draw, follows });
  const [drawn, shown] = draw();
  Plotly.newPlot(element, drawn, shown, options);
  if (follows) element.on("plotly_relayout", change => follow(element, change));
}

function metrics() {
  const names = new Set();
  for (const run of runs) {
    for (const [key, curve] of Object.entries(run.curves)) {
      if (curve.step.length < 2) continue;  // The headline has it.
      const name = key.split("/")[1];
      const varies = curve.value.some(value => value !== curve.value[0]);
      // Tokens of a step are the horizontal axis; without further terms the loss is the cross-entropy.
      if (key.endsWith(" smoothed") || name.endsWith("tokens") || (name === "skipped" && !varies)) continue;
      if (name === "cross_entropy" && String(curve.value) ===
          String(run.curves["train/loss"]?.value)) continue;
      names.add(name);
    }
  }
  const rank = name => ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length;
  return [...names].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}

function choice(values, name, changed) {
  const select = document.createElement("select");
  select.setAttribute("aria-label", name);
  values.forEach(([value, text]) => select.append(new Option(text, value)));
  select.addEventListener("change", () => changed(select.value));
  return select;
}

function addLayers() {
  const having = runs.map((run, index) => [index, run]).filter(
    ([, run]) => Object.keys(run.layers.maps).length);
  if (!having.length) return;
  document.getElementById("layers").hidden = false;
  view.run = having[0][0];
  const row = document.getElementById("layer-choice"), draw = () => {
    const [drawn, shown] = layerPlot();
    Plotly.react(document.getElementById("layer-map"), drawn, shown, options);
  };
  const maps = [...new Set(having.flatMap(([, run]) => Object.keys(run.layers.maps)))];
  const first = maps.filter(name => !name.includes(" of ")), last = maps.filter(name => name.includes(" of "));
  view.map = first[0];
  if (runs.length > 1) {
    row.append(choice(having.map(([index, run]) => [index, run.name]), "run", value => {
      view.run = Number(value); draw();
    }));
  }
  row.append(choice([...first, ...last].map(name => [name, name]), "what", value => {
    view.map = value; draw();
  }));
  addPlot(document.getElementById("layer-map"), layerPlot, true);
}

function addControls() {
  const nav = document.getElementById("controls");
  nav.hidden = false;
  for (const button of nav.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const name = button.dataset.toggle;
      if (name) {
        view[name] = !view[name];
        button.setAttribute("aria-pressed", view[name]);
      } else {
        view.x = button.dataset.value;
        for (const each of button.parentElement.children) {
          each.setAttribute("aria-pressed", each === button);
        }
      }
      drawAll();
    });
  }
  document.getElementById("smoothing").addEventListener("input", event => {
    view.smoothing = Number(event.target.value);
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}

function addAll() {
  const room = document.getElementById("plots");
  for (const metric of metrics()) {
    const section = document.createElement("section"), title = document.createElement("h2");
    const element = document.createElement("div");
    title.textContent = TITLES[metric] || metric.replaceAll("_", " ");
    element.className = "plot";
    section.append(title, element);
    room.append(section);
    addPlot(element, () => metricPlot(metric), true);
  }
  addLayers();
  const timeline = document.getElementById("timeline");
  if (timeline) addPlot(timeline, timelinePlot, false);
  addControls();
}

/** Plotly's script, which the page carries compressed, is unpacked and run. */
async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent),
    letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

unpack().then(addAll).catch(error => {
  const note = document.createElement("p");
  note.textContent = `The curves could not be drawn (${error}); a browser of 2023 or later can.`;
  document.getElementById("plots").append(note);
  throw error;
});
