"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();  // keys of the lines that are not shown
const choice = {x: "step", y: "loss"};
const EARLY = {loss: 0.05, difference: 0.25};  // of the run: left out at first
const byId = id => document.getElementById(id);
const grouped = value => value.toLocaleString("en-US", {maximumFractionDigits: 3});
const last = values => values[values.length - 1];
const inkOf = g => `--group-${data.groups[g].label === "failed" ? 5 : Math.min(g, 4)}`;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** An element with properties or attributes; text is always text, never markup. */
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    name in node ? node[name] = value : node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function swatch(g) {
  const node = make("span", {className: "swatch"});
  node.style.setProperty("--colour", `var(${inkOf(g)})`);
  return node;
}

/** Digits behind the point of the number that has most of them: as many as the log prints. */
function decimalsOf(values) {
  return Math.max(0, ...values.map(value => value === null ? 0 : (String(value).split(".")[1] || "").length));
}

// ---------------------------------------------------------------------------------------------------------------------
// Lines: one for each run, one for each group's mean

const keyOf = (g, run) => `${g} ${run.name}`;
const curves = data.groups.flatMap(group => [group.mean, ...group.runs]).filter(Boolean);

function nameOf(group, r) {
  const name = group.runs[r].name.replace(/^([0-9a-f]{8})-[0-9a-f-]{27}$/, "$1");  // of a run id, its beginning
  if (group.runs.length === 1) return `${group.label} (${name})`;
  return `${group.label}, run ${r + 1} (${name})`.replace(/^all, /, "").replace(/ \(run \d+\)$/, "");
}

/** pick(curve, isMean) gives {x, y, tell(i)} or nothing; points without a number are left out. */
function linesOf(pick) {
  const lines = [];
  const add = (g, curve, key, label, isMean) => {
    const found = curve && pick(curve, isMean);
    if (!found) return;
    const known = found.x.map((_, i) => i).filter(i => found.x[i] !== null && found.y[i] !== null);
    const faint = !isMean && data.groups[g].runs.length > 3;
    if (known.length) lines.push({key, label, g, isMean, alpha: isMean ? "" : faint ? "80" : "d0",
                                  width: isMean ? 2.5 : faint ? 1 : 1.75, x: known.map(i => found.x[i]),
                                  y: known.map(i => found.y[i]), tell: i => found.tell(known[i])});
  };
  data.groups.forEach((group, g) => {
    group.runs.forEach((run, r) => add(g, run, keyOf(g, run), nameOf(group, r), false));
    add(g, group.mean, `${g} mean`, group.mean && group.mean.label, true);
  });
  return lines;
}

/** What differences are taken to: the first group's mean, or its first run. */
function reference() {
  const group = data.groups.find(({mean, runs}) => mean || runs.length);
  return group && (group.mean || {...group.runs[0], label: nameOf(group, 0)});
}

function lossLines() {
  const base = reference();
  const xOf = curve => choice.x === "time" ? curve.ms.map(ms => ms === null ? null : ms / 60_000) : curve.step;
  const baseX = base && xOf(base);
  return linesOf((curve, isMean) => {
    const x = xOf(curve), digits = isMean ? 6 : decimalsOf(curve.loss);
    const apart = x.map((at, i) => {
      const expected = at === null ? null : interpolate(baseX, base.loss, at);
      return expected === null || curve.loss[i] === null ? null : 1000 * (curve.loss[i] - expected);
    });
    return {x, y: choice.y === "loss" ? curve.loss : apart, tell: i =>
      `step ${grouped(curve.step[i])}: loss ${curve.loss[i].toFixed(digits)}`
      + (curve.ms[i] === null ? "" : `, ${grouped(curve.ms[i])} ms`)
      + (choice.y === "loss" ? "" : `, difference ${apart[i] < 0 ? "" : "+"}${apart[i].toFixed(3)}`)};
  });
}

function interpolate(x, y, at) {
  const next = x.findIndex(value => value !== null && value >= at);
  if (next < 0 || x[next] !== at && next === 0) return null;
  const share = x[next] === at ? 1 : (at - x[next - 1]) / (x[next] - x[next - 1]);
  return share === 1 ? y[next] : y[next - 1] + share * (y[next] - y[next - 1]);
}

function stepTimeLines() {
  return linesOf(({step_ms: points}, isMean) => points && {...points, tell: i => isMean && i + 1 < points.x.length
    ? `steps ${grouped(points.x[i] + 1)} to ${grouped(points.x[i + 1])}: ${points.y[i]} ms a step`
    : `step ${grouped(points.x[i])}: ${points.y[i]} ms`});
}

function scalarLines(name) {
  return linesOf(({fields, scalars, step}) => {
    const points = fields && fields[name] || scalars[name] && {x: step, y: scalars[name]};
    return points && {...points, tell: i => `step ${grouped(points.x[i])}: ${name} ${points.y[i]}`};
  });
}

/** Final losses: a dot for each run; below, the mean and its interval. */
function finalLines() {
  const lines = [];
  data.groups.forEach(({final, label, runs}, g) => {
    const counted = runs.filter(run => run.counts);
    if (!final) return;
    counted.forEach((run, i) => lines.push({
      key: keyOf(g, run), label: nameOf(data.groups[g], runs.indexOf(run)), g, alpha: "b0", size: 9,
      x: [last(run.loss)], y: [0.1 + 0.12 * (i % 5) - g],
      tell: () => `final loss ${last(run.loss).toFixed(decimalsOf(run.loss))}`}));
    if (counted.length < 2) return;
    const mean = {key: `${g} mean`, label: `${label}, mean of ${counted.length} runs`, g, alpha: "", size: 11};
    const ends = [final.low, final.high], words = ["95% interval from", "95% interval to"];
    lines.push({...mean, width: 4, x: ends, y: [-0.15 - g, -0.15 - g], tell: i => `${words[i]} ${ends[i].toFixed(6)}`},
               {...mean, x: [final.mean], y: [-0.15 - g], tell: () => `final loss ${final.mean.toFixed(6)}`});
  });
  return lines;
}

// ---------------------------------------------------------------------------------------------------------------------
// A chart: what uPlot draws, with its zoom and cursor, and a line of text for the point under the cursor

class Chart {
  /** spec: title(), lines(), x() names the axis; early() is the share of it that is left out at first; the rest is
      optional: marks() on the x axis to make room for, pad, the share of margins, yRange, height, y for the y axis,
      paint(u) on top. */
  constructor(host, spec) {
    this.spec = {early: () => 0, x: () => "step", marks: () => [], pad: 0, height: 400, y: {}, paint: () => {},
                 ...spec};
    this.caption = make("figcaption");
    this.out = make("output");
    this.plot = make("div", {className: "plot"});
    host.replaceChildren(make("figure", {className: "chart"}, this.caption, this.out, this.plot));
    new ResizeObserver(() => this.u && this.u.setSize(this.size())).observe(this.plot);
  }

  size() { return {width: Math.max(this.plot.clientWidth, 200), height: this.spec.height}; }

  draw() {
    this.lines = this.spec.lines();
    if (this.u) this.u.destroy();
    this.u = null;
    this.out.replaceChildren();
    this.caption.textContent = this.spec.title();
    if (!this.lines.length) return;
    const ends = [...this.lines.flatMap(line => [line.x[0], last(line.x)]), ...this.spec.marks()];
    const [low, high] = [Math.min(...ends), Math.max(...ends)], pad = low === high ? 0.5 : this.spec.pad * (high - low);
    // A line without points widens the axis: to the marks, and by a margin.
    const points = uPlot.join([[[low - pad, high + pad], [null, null]], ...this.lines.map(line => [line.x, line.y])]);
    this.u = new uPlot(this.options(), points, this.plot);
    if (low < high && this.spec.early()) this.u.setScale("x", {min: low + this.spec.early() * (high - low), max: high});
  }

  options() {
    const numbers = (u, splits, i, space, step) => {  // uPlot's own have three decimals at most
      const digits = decimalsOf([+step.toPrecision(3)]);
      const format = {minimumFractionDigits: digits, maximumFractionDigits: digits};
      return splits.map(value => value.toLocaleString("en-US", format));
    };
    const font = "12px system-ui, sans-serif";
    const axis = {stroke: css("--soft"), font, labelFont: font, grid: {stroke: css("--grid"), width: 1},
                  ticks: {stroke: css("--grid"), size: 5}, values: numbers};
    const distance = (u, s, i, top, cursorTop) => Math.hypot(
      u.valToPos(u.data[0][i], "x") - u.cursor.left, top - cursorTop);
    const {paint, stepped, x, y, yRange} = this.spec;
    return {
      ...this.size(), legend: {show: false}, focus: {alpha: 0.3}, padding: [8, 24, 0, 0],
      cursor: {y: false, points: {one: true, size: 10}, focus: {prox: 1e6, dist: distance}},
      scales: {x: {time: false}, y: yRange ? {range: yRange} : {}},
      axes: [{...axis, label: x(), labelSize: 20, size: 32}, {...axis, size: 64, ...y}],
      series: [{}, {show: false}, ...this.lines.map(line => ({
        stroke: css(inkOf(line.g)) + line.alpha, width: line.width, show: !hidden.has(line.key), spanGaps: true,
        paths: line.isMean && stepped ? uPlot.paths.stepped({align: 1}) : undefined,
        points: {show: line.x.length === 1, size: line.size || 6, fill: css(inkOf(line.g)) + line.alpha}
      }))],
      hooks: {draw: [paint], setSeries: [(u, i, {focus}) => focus && this.read(u, i)],
              setCursor: [u => this.read(u, this.focused)]}};
  }

  /** Reads out the point of series i, the nearest to the cursor. */
  read(u, i) {
    this.focused = i;
    const at = i && u.cursor.idxs[i], line = this.lines[i - 2];
    if (at === null || !line) return;
    this.out.replaceChildren(swatch(line.g), `${line.label} \u2014 ${line.tell(line.x.indexOf(u.data[0][at]))}`);
  }

  /** Shows the lines that are not hidden. */
  update() {
    const show = (line, i) => this.u.setSeries(i + 2, {show: !hidden.has(line.key)});
    if (this.u) this.u.batch(() => this.lines.forEach(show));
  }
}

/** The target across the final losses. */
function paintTarget(u) {
  if (data.target === null) return;
  const x = u.valToPos(data.target, "x", true), {left, top, width, height} = u.bbox;
  if (x < left || x > left + width) return;
  Object.assign(u.ctx, {strokeStyle: css("--ink"), fillStyle: css("--ink"), lineWidth: devicePixelRatio,
                        textBaseline: "top", font: `${12 * devicePixelRatio}px system-ui, sans-serif`,
                        textAlign: x > left + width / 2 ? "right" : "left"});
  u.ctx.setLineDash([5 * devicePixelRatio, 3 * devicePixelRatio]);
  u.ctx.beginPath();
  u.ctx.moveTo(x, top);
  u.ctx.lineTo(x, top + height);
  u.ctx.stroke();
  u.ctx.setLineDash([]);
  u.ctx.fillText(` target ${data.target} `, x, top);
}

// ---------------------------------------------------------------------------------------------------------------------
// Legend, tables, texts

const boxes = [];  // pairs: a checkbox, the keys of the lines that it stands for

function checkbox(keys, ...words) {
  const box = make("input", {type: "checkbox", checked: true});
  boxes.push([box, keys]);
  box.addEventListener("change", () => {
    keys.forEach(key => box.checked ? hidden.delete(key) : hidden.add(key));
    boxes.forEach(([other, its]) => { other.checked = its.some(key => !hidden.has(key)); });
    charts.forEach(chart => chart.update());
  });
  return make("label", {}, box, ...words);
}

/** Of every group its mean, all its runs together, and each run with its last loss. */
function legend() {
  byId("legend").replaceChildren(...data.groups.map((group, g) => {
    const keys = group.runs.map(run => keyOf(g, run));
    const runs = group.runs.map((run, r) => checkbox([keys[r]], `${r + 1}`, make(
      "span", {className: "value"}, run.loss.length ? last(run.loss).toFixed(decimalsOf(run.loss)) : "no loss")));
    return make("div", {className: "group"},
      make("div", {className: "group-head"}, make("strong", {}, swatch(g), group.label),
        ...(group.mean ? [checkbox([`${g} mean`], "mean")] : []),
        checkbox(keys, keys.length === 1 ? "1 run" : `${keys.length} runs`)),
      make("details", {open: runs.length < 9}, make("summary", {className: "plain"}, "each run, with its last loss"),
        make("div", {className: "group-runs"}, ...runs)));
  }));
}

function table({caption, header, rows}) {
  const isNumber = text => /^[+-]?[\d,.]*(e-?\d+| to [+-]?[\d.]+)?$/.test(text);
  const numeric = header.map((_, i) => i > 0 && rows.every(row => isNumber(row[i])));
  const cells = (row, scope) => row.map((text, i) => make(scope === "col" || i === 0 ? "th" : "td", {
    className: numeric[i] ? "number" : "", ...(scope === "col" || i === 0 ? {scope} : {})}, text));
  return make("div", {className: "scroll", tabIndex: 0, role: "region", "aria-label": caption}, make("table", {},
    make("caption", {}, caption), make("thead", {}, make("tr", {}, ...cells(header, "col"))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...cells(row, "row"))))));
}

/** Shows the tables that have rows, or says that there is nothing; returns whether there are any. */
function fill(id, tables, nothing = "") {
  const shown = tables.filter(found => found && found.rows.length);
  byId(id).replaceChildren(...shown.map(table), ...(shown.length || !nothing ? [] : [make("p", {}, nothing)]));
  return shown.length > 0;
}

function texts() {
  document.title = document.querySelector("h1").textContent = data.title;
  for (const id of ["headline", "thinning"]) byId(id).textContent = data[id];
  byId("sentences").replaceChildren(...data.sentences.map(text => make("p", {}, text)));
  byId("warnings").replaceChildren(...data.warnings.map(text => make("p", {className: "hint"}, `Warning: ${text}.`)));
  byId("claim").hidden = !fill("sides", [data.sides, data.difference]);
  byId("equal").parentElement.hidden = !fill("equal", data.equal);
  fill("runs", [data.runs]);
  fill("step-table", [data.step_times]);
  fill("machine-table", [data.machine]);
  const [differing, shared] = data.constants;
  byId("constants").hidden = !differing;
  if (differing) {
    fill("constants-differ", [differing], "No constant differs between these runs, but for the seeds.");
    byId("constants-shared").parentElement.hidden = !fill("constants-shared", [shared]);
  }
  byId("source").hidden = !data.source;
  if (data.source) {
    const kinds = {"+": "add", "-": "remove", "@": "place"};
    byId("source-note").textContent = data.source.note;
    byId("diff").parentElement.hidden = !data.source.lines.length;
    byId("diff").replaceChildren(...data.source.lines.map(
      line => make("span", {className: kinds[line[0]] || ""}, line || " ")));
  }
  byId("check").hidden = !data.check;
  if (data.check) {
    byId("verdict").textContent = data.check.verdict;
    fill("findings", [data.check.table]);
    byId("kept").textContent = data.check.kept;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The page

const lossChart = new Chart(byId("loss-chart"), {
  title: () => choice.y === "loss" ? "Validation loss (nats/token)" : "Difference of the loss (0.001 nats/token)",
  x: () => choice.x === "step" ? "step" : "training time (min)",
  lines: lossLines, early: () => EARLY[choice.y]});
const counting = data.groups.filter(group => group.final).length;
const finalChart = new Chart(byId("final-chart"), {
  title: () => "A dot is a run; below, their mean with its 95% interval", x: () => "final validation loss (nats/token)",
  lines: finalLines, pad: 0.04, height: 75 + 85 * counting, marks: () => data.target === null ? [] : [data.target],
  paint: paintTarget, yRange: [0.6 - counting, 0.75],
  y: {splits: () => data.groups.map((_, g) => -g), grid: {show: false}, ticks: {show: false},
      values: (u, splits) => splits.map(g => data.groups[-g].final ? data.groups[-g].label : "")}});
const stepChart = new Chart(byId("step-chart"), {
  title: () => "Milliseconds per step; the mean is taken between validations", lines: stepTimeLines, stepped: true});

/** One small chart for each scalar and each field of the step lines. */
const names = [...new Set(curves.flatMap(({scalars, fields}) => Object.keys({...scalars, ...fields})))];
const multiples = names.map(name => {
  const host = make("div");
  document.querySelector(".multiples").append(host);
  return new Chart(host, {title: () => name, lines: () => scalarLines(name), height: 210});
});
byId("reference").textContent = reference() ? reference().label : "";
byId("loss").hidden = !lossLines().length;
byId("against").hidden = !curves.some(curve => curve.ms.some(ms => ms !== null));
byId("spread").hidden = !counting;
byId("final-chart").hidden = finalLines().length < 2;
byId("step-time").hidden = !stepTimeLines().length;
byId("scalars").hidden = !names.length;
texts();
legend();
const charts = [lossChart, finalChart, stepChart, ...multiples];
charts.forEach(chart => chart.draw());
document.querySelector("nav").append(...[...document.querySelectorAll("main > section:not([hidden])")].map(
  section => make("a", {href: `#${section.id}`}, section.querySelector("h2").textContent)));
document.querySelectorAll("input[type=radio]").forEach(input => input.addEventListener("change", () => {
  choice[input.name] = input.value;
  lossChart.draw();
}));
})();
