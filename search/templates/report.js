"use strict";
(() => {
  const root = document.documentElement;
  const specs = new Map();

  // var() anywhere in a figure becomes the style sheet's colour of that name, in the theme of the moment.
  function coloured(value, style) {
    if (typeof value === "string") {
      return value.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
    }
    if (Array.isArray(value)) return value.map((v) => coloured(v, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, v]) => [key, coloured(v, style)]));
    }
    return value;
  }

  function draw(holder) {
    const spec = coloured(specs.get(holder), getComputedStyle(root));
    const mouse = window.matchMedia("(hover: hover) and (pointer: fine)").matches;
    const layout = { ...spec.layout, dragmode: mouse ? "zoom" : false };
    const buttons = [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]];
    const config = { responsive: true, displaylogo: false, modeBarButtons: buttons, displayModeBar: mouse ? "hover" : false };
    Plotly.react(holder, spec.data, layout, config);
  }

  function drawAll() {
    specs.forEach((_, holder) => draw(holder));
  }

  for (const holder of document.querySelectorAll("[data-figure]")) {
    specs.set(holder, JSON.parse(document.getElementById(holder.dataset.figure).textContent));
  }
  drawAll();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => { root.classList.add("printing"); drawAll(); });
  window.addEventListener("afterprint", () => { root.classList.remove("printing"); drawAll(); });

  const front = document.querySelector('[data-figure="front-figure"]');
  if (front) {
    const axes = JSON.parse(document.getElementById("axes").textContent);
    const choice = { x: document.querySelector('[data-axis="x"]'), y: document.querySelector('[data-axis="y"]') };
    const pairs = [...document.querySelectorAll(".pair")];

    // The steps of the members that no other one beats in both axes, from left to right.
    function lowerLeft(points) {
      const known = points.filter(([x, y]) => x !== null && y !== null).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
      const steps = [];
      for (const point of known) if (!steps.length || point[1] < steps[steps.length - 1][1]) steps.push(point);
      return steps;
    }

    // A baseline's name goes where it covers least: right or left of its mark, above or below.
    function placeNames(spec) {
      const { xaxis, yaxis } = front._fullLayout;
      const box = (x, y, width, height) => ({ l: x - width / 2, r: x + width / 2, t: y - height / 2, b: y + height / 2 });
      const frame = { l: 0, r: xaxis._length, t: 0, b: yaxis._length };
      const cover = (a, b) => Math.max(0, Math.min(a.r, b.r) - Math.max(a.l, b.l)) * Math.max(0, Math.min(a.b, b.b) - Math.max(a.t, b.t));
      const spots = (trace) => trace.x.map((x, i) => [x, trace.y[i]]).filter(([x, y]) => x !== null && y !== null)
        .map(([x, y]) => [xaxis.d2p(x), yaxis.d2p(y)]);
      const named = spec.data.filter((trace) => trace.textposition);
      const boxes = (traces, size) => traces.flatMap((trace) => spots(trace).map(([x, y]) => box(x, y, size, size)));
      const taken = boxes(named, 16);
      const crowd = boxes(spec.data.filter((trace) => trace.name === "front"), 12);
      const clash = (place, others) => others.reduce((sum, other) => sum + cover(place, other), 0);
      for (const trace of named) {
        const width = 7 * trace.text[0].length;
        for (const [x, y] of spots(trace)) {
          const places = [
            ["middle right", box(x + 10 + width / 2, y, width, 16)], ["middle left", box(x - 10 - width / 2, y, width, 16)],
            ["top center", box(x, y - 17, width, 16)], ["bottom center", box(x, y + 17, width, 16)],
          ].map(([name, place]) => {
            const outside = width * 16 - cover(place, frame);
            // Two names over each other are worse than a name over one mark of many.
            return { name, place, cost: 10 * outside + 5 * clash(place, taken) + clash(place, crowd) };
          });
          const best = places.reduce((a, b) => (b.cost < a.cost ? b : a));
          trace.textposition = best.name;
          taken.push(best.place);
        }
      }
    }

    function showAxes() {
      const spec = specs.get(front);
      const [x, y] = [Number(choice.x.value), Number(choice.y.value)];
      for (const trace of spec.data.filter((t) => t.customdata)) {
        trace.x = trace.customdata.map((row) => row[x]);
        trace.y = trace.customdata.map((row) => row[y]);
      }
      const members = spec.data.find((trace) => trace.name === "front").customdata;
      const steps = lowerLeft(members.map((row) => [row[x], row[y]]));
      const line = spec.data.find((trace) => trace.mode === "lines");
      line.x = steps.map((step) => step[0]);
      line.y = steps.map((step) => step[1]);
      for (const [axis, index] of [["xaxis", x], ["yaxis", y]]) {
        const { title, ...scale } = axes[index];
        Object.assign(spec.layout[axis], scale);
        spec.layout[axis].title.text = title;
      }
      pairs.forEach((pair) => pair.setAttribute("aria-pressed", String(Number(pair.dataset.x) === x && Number(pair.dataset.y) === y)));
      draw(front);
      placeNames(spec);
      draw(front);
    }

    choice.x.addEventListener("change", showAxes);
    choice.y.addEventListener("change", showAxes);
    for (const pair of pairs) {
      pair.addEventListener("click", () => {
        choice.x.value = pair.dataset.x;
        choice.y.value = pair.dataset.y;
        showAxes();
        front.scrollIntoView({ block: "nearest" });
      });
    }
    showAxes();
    front.on("plotly_click", (event) => {
      const point = event.points[0];
      const card = point.data.name === "front" && document.getElementById(`winner-${point.data.text[point.pointNumber]}`);
      if (card) {
        const fold = card.closest("details");
        if (fold) fold.open = true;
        card.scrollIntoView();
      }
    });
  }

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const body = table.tBodies[0];
    table.querySelectorAll("thead th").forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        const key = (row) => Number.parseFloat(row.cells[column].dataset.value);
        const rows = [...body.rows].sort((a, b) => {
          const [p, q] = [key(a), key(b)];
          if (Number.isNaN(p) || Number.isNaN(q)) return Number.isNaN(p) - Number.isNaN(q);
          return descending ? q - p : p - q;
        });
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        body.append(...rows);
      });
    });
  }

  // A link to a member in the folded part opens the fold.
  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    const fold = target && target.closest("details");
    if (fold && !fold.open) { fold.open = true; target.scrollIntoView(); }
  };
  window.addEventListener("hashchange", reveal);
  reveal();
})();
