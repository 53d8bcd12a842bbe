"use strict";
// Tables sort and filter at once; charts are drawn when they come near, for their library takes longer than the page.
(() => {
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // ---- tables ----
  const number = text => (text === "—" || text === "" ? NaN : Number(text));
  const words = new Intl.Collator(undefined, { numeric: true });
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? words.compare(a, b) : x - y;
  };
  function sort(heading) {
    const table = heading.closest("table"), body = table.tBodies[0];
    const place = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies].flatMap(part => [...part.rows]).map(row => [row.cells[place].textContent, row]);
    rows.sort(([a], [b]) => {
      if ((a === "—") !== (b === "—")) return a === "—" ? 1 : -1; // what is missing stays last
      return down ? compare(b, a) : compare(a, b);
    });
    body.append(...rows.map(([, row]) => row));
  }
  document.addEventListener("click", event => {
    const button = event.target.closest("button.sort");
    if (button) sort(button.closest("th"));
  });
  document.addEventListener("input", event => {
    const id = event.target.dataset.filter;
    if (!id) return;
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of document.getElementById(id).querySelectorAll("tbody tr")) {
      const text = row.textContent.toLowerCase();
      const cells = words.length > 1 ? [...row.cells].map(cell => cell.textContent.toLowerCase()) : [text];
      row.hidden = !words.every(word => cells.some(cell => cell.includes(word)));
      count += !row.hidden;
    }
    document.querySelector(`[data-count="${id}"]`).textContent = `${count} rows`;
  });

  // ---- charts ----
  let loaded = false;
  function library() {
    if (!loaded) {
      const script = document.createElement("script");
      script.textContent = document.getElementById("plotly").textContent;
      document.head.append(script);
      loaded = true;
    }
    return window.Plotly;
  }
  function scale(name, trace) {
    if (name === "formats") { // one colour for each format, from the fewest bits to the most
      const count = Math.round(trace.zmax - trace.zmin);
      return [...Array(count).keys()].flatMap(place => {
        const own = colour(`--c${place % 8}`);
        return [[place / count, own], [(place + 1) / count, own]];
      });
    }
    const stops = name === "diverging" ? ["--better", "--neutral", "--worse"] : ["--low", "--middle", "--high"];
    return stops.map((stop, place) => [place / 2, colour(stop)]);
  }
  function marks(spec, name) { // over one decade or two plotly marks 6, 7, 8 and 9 on top of each other
    if (spec.layout[name]?.type !== "log") return {};
    const values = spec.data.flatMap(trace => trace[name[0]] ?? []).filter(value => value > 0);
    const decades = Math.log10(Math.max(...values) / Math.min(...values));
    return decades > 0.5 && decades < 2.5 ? { dtick: "D2" } : { nticks: 6 };
  }
  function themed(spec) {
    const text = colour("--text"), grid = colour("--grid"), back = "rgba(0,0,0,0)";
    const way = [...Array(8).keys()].map(place => colour(`--c${place}`));
    const axis = { gridcolor: grid, zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
    const merged = name => ({ ...axis, ...marks(spec, name), ...spec.layout[name], title: { standoff: 8, ...spec.layout[name]?.title } });
    const layout = {
      margin: { l: 8, r: 8, t: 30, b: 8 }, barmode: "group", bargap: 0.25, hovermode: "closest",
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 11 } },
      ...spec.layout, xaxis: merged("xaxis"), yaxis: merged("yaxis"),
      paper_bgcolor: back, plot_bgcolor: back, colorway: way, font: { color: text, size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: colour("--back"), bordercolor: colour("--line"), font: { color: text }, namelength: -1 },
      modebar: { bgcolor: back, color: colour("--dim"), activecolor: text },
    };
    const data = spec.data.map(trace => {
      if (trace.type !== "heatmap") return trace;
      const bar = { ...trace.colorbar, outlinewidth: 0, tickfont: { color: text, size: 10 } };
      return { ...trace, colorscale: scale(trace.colorscale, trace), colorbar: bar };
    });
    return [data, layout];
  }
  // Only what works without a network.
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const settings = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: buttons };
  const specs = new Map(); // element -> function that gives what is drawn in it
  const drawn = new Set();
  function draw(plot) {
    const [data, layout] = themed(specs.get(plot)());
    library().react(plot, data, layout, settings);
    drawn.add(plot);
  }
  for (const script of document.querySelectorAll("script[data-chart]")) {
    let spec;
    specs.set(document.getElementById(script.dataset.chart), () => (spec ??= JSON.parse(script.textContent)));
  }

  // ---- bits against quality ----
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"];
  function front(points) {
    const sorted = [...points].sort((a, b) => a.x - b.x || a.y - b.y), found = [];
    for (const point of sorted) if (!found.length || point.y < found[found.length - 1].y) found.push(point);
    return found;
  }
  function explored(runs, id) {
    const chosen = part => document.getElementById(`${id}-${part}`);
    const model = chosen("model").value, only = chosen("method").value;
    const key = Object.keys(runs.measures)[chosen("measure").selectedIndex];
    const logarithmic = chosen("scale").value === "logarithmic";
    let points = [], below = 0;
    runs.models.forEach((name, place) => {
      const x = runs.bits[place], y = runs.measures[key][place];
      if (unescaped(name) !== model || x === null || y === null) return;
      if (logarithmic && y <= 0) below += 1;
      else points.push({ x, y, method: runs.methods[place], label: runs.labels[place] });
    });
    const best = front(points), methods = [...new Set(runs.methods)]; // a method looks the same whatever is chosen
    const traces = methods.map((method, place) => {
      const own = points.filter(point => point.method === method), faint = only && unescaped(method) !== only;
      return {
        type: "scatter", mode: "markers", name: method, showlegend: !faint, x: own.map(p => p.x), y: own.map(p => p.y),
        text: own.map(p => p.label), hovertemplate: "%{text}<br>%{x:.4g} bits<br>%{y:.5g}<extra></extra>",
        marker: {
          size: 8, color: colour(faint ? "--line" : `--c${place % 8}`),
          symbol: SYMBOLS[Math.floor(place / 8) % SYMBOLS.length], opacity: faint ? 0.5 : 0.85,
        },
      };
    }).filter(trace => trace.x.length);
    const many = !only && traces.length > 12, wide = document.getElementById(id).clientWidth > 700;
    traces.sort((a, b) => (unescaped(a.name) === only) - (unescaped(b.name) === only)); // the chosen one on top
    traces.push({
      type: "scatter", mode: "lines", name: "Pareto front", x: best.map(p => p.x), y: best.map(p => p.y),
      line: { shape: "hv", width: 1.5, color: colour("--dim"), dash: "dot" }, hoverinfo: "skip",
    });
    const some = best.slice(0, 6).map(p => `${unescaped(p.label)}: ${p.x.toPrecision(4)} bits, ${p.y.toPrecision(4)}`);
    const hidden = below ? ` Left out, for a logarithmic scale has no place for values at or below zero: ${below}.` : "";
    chosen("alt").textContent =
      `${points.length} runs; lower left is better. None beats these in both: ${some.join("; ")}${best.length > 6 ? "; …" : "."}${hidden}`;
    const legend = many && wide ? { legend: { orientation: "v", x: 1.01, y: 1, font: { size: 11 } } } : {};
    return {
      data: traces,
      layout: {
        xaxis: { title: { text: "average bits per weight" } },
        yaxis: { title: { text: key }, type: logarithmic ? "log" : "linear", tickformat: "~g" },
        showlegend: wide || !many, ...legend,
      },
    };
  }
  function unescaped(text) {
    return text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  }
  for (const script of document.querySelectorAll("script[data-explorer]")) {
    const id = script.dataset.explorer, runs = JSON.parse(script.textContent), plot = document.getElementById(id);
    specs.set(plot, () => explored(runs, id));
    for (const part of ["model", "measure", "method", "scale"]) {
      document.getElementById(`${id}-${part}`).addEventListener("change", () => draw(plot));
    }
  }

  // ---- when ----
  const near = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      requestAnimationFrame(() => draw(entry.target));
    }
  }, { rootMargin: "300px" });
  function start() {
    document.documentElement.classList.remove("loading"); // rows below the first screen
    specs.forEach((_, plot) => near.observe(plot));
  }
  // The first paint shows text and tables.
  requestAnimationFrame(() => setTimeout(start));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => specs.forEach((_, plot) => drawn.has(plot) || draw(plot)));
})();
