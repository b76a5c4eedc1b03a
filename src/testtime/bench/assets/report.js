"use strict";
(() => {
  const { styles, sections } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const mode = sections.map(() => "running");
  let shown = 0;

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const place = (name, i, j) => document.getElementById([name, i, j].filter((x) => x !== undefined).join("-"));
  const part = (i) => document.querySelectorAll("section.run")[i];
  const color = (name) => css(`--m${styles[name].slot}`);
  // Plotly reads a little HTML in texts; names are shown as they are.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));
  const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

  function axis(more) {
    const line = css("--line"), soft = css("--soft");
    return { gridcolor: line, linecolor: line, zeroline: false, showline: true, tickfont: { color: soft, size: 12 },
      automargin: true, ...more, title: { font: { color: soft, size: 12.5 }, standoff: 8, ...more.title } };
  }
  function layout(more) {
    return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--text"), size: 13 },
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--text"), size: 12.5 }, namelength: -1 },
      ...more };
  }
  function draw(node, traces, figure, tools) {
    const touch = matchMedia("(pointer: coarse)").matches;
    Plotly.react(node, traces, { ...figure, dragmode: tools && !touch ? "zoom" : false }, { displaylogo: false, displayModeBar: false, scrollZoom: false });
  }
  function strong(i) {
    return new Set([...part(i).querySelectorAll('.chip[aria-pressed="true"]')].map((c) => c.dataset.method));
  }

  // Error over time: strong lines above faint ones, bands and names for the domains.
  function drawTime(i) {
    const node = place("time", i), width = node.clientWidth, narrow = width < 600;
    const { methods, visits } = sections[i], on = strong(i);
    const traces = methods.map(({ name, time }) => ({
      type: "scatter", mode: time.batch.length > 1 ? "lines" : "markers", name: plain(name),
      x: time.batch.map((b) => b + 1), y: time[mode[i]], opacity: on.has(name) ? 1 : 0.28,
      line: { color: color(name), width: on.has(name) ? (name === "source" ? 2.6 : 2) : 1, dash: styles[name].dash },
      marker: { color: color(name), size: 9, symbol: styles[name].symbol },
      hoverinfo: on.has(name) ? undefined : "skip", hovertemplate: on.has(name) ? "%{y:.1f} %" : undefined,
    }));
    traces.sort((a, b) => a.opacity - b.opacity || (a.name === "source") - (b.name === "source"));
    const last = Math.max(1, ...methods.map((m) => (m.time.batch.at(-1) ?? 0) + 1));
    const range = last > 1 ? [0.5, last + 0.5] : [0, 2];
    const left = 58, end = visits.at(-1);
    const crowd = end ? Math.max(12, short(end.name, 22).length * 6.2 - (last - end.batch) / last * width / 2) : 12;
    const right = narrow ? 4 : visits.length > 1 && width / visits.length > 34 ? crowd : 12;
    const pixels = (width - left - right) / (range[1] - range[0]);
    const ends = visits.map((_, k) => (visits[k + 1]?.batch ?? last) + 0.5);
    const shapes = visits.length < 2 ? [] : visits.flatMap((visit, k) => (k % 2 ? [] : [{ type: "rect", layer: "below",
      xref: "x", yref: "paper", x0: visit.batch + 0.5, x1: ends[k], y0: 0, y1: 1, line: { width: 0 }, fillcolor: css("--band") }]));
    const steep = visits.some((_, k) => (ends[k] - visits[k].batch) * pixels < 30);
    const annotations = [];
    let free = -Infinity, longest = 0;
    visits.forEach((visit, k) => {
      const middle = ((visit.batch + 0.5 + ends[k]) / 2 - range[0]) * pixels;
      if (middle - free < (steep ? 14 : 24)) return;
      free = middle;
      const text = short(visit.name.replace(/_/g, " "), 22);
      longest = Math.max(longest, text.length);
      annotations.push({ text: plain(text), x: (visit.batch + 0.5 + ends[k]) / 2, xref: "x", y: 1, yref: "paper",
        showarrow: false, textangle: visits.length === 1 ? 0 : steep ? -90 : -40, xanchor: visits.length === 1 || steep ? "center" : "left", yanchor: "bottom",
        xshift: visits.length === 1 || steep ? 0 : -5, yshift: 3, font: { size: narrow ? 11 : 12, color: css("--soft") } });
    });
    const room = visits.length === 1 ? 24 : longest * (steep ? 6.4 : 4.6) + 18;
    const tall = Math.max(...methods.flatMap((m) => finite(m.time[mode[i]])), 1);
    draw(node, traces, layout({ height: (narrow ? 300 : 380) + room, margin: { l: left, r: right, t: room, b: 48 },
      hovermode: "x unified", shapes, annotations,
      xaxis: axis({ title: { text: "Batch" }, range, showgrid: false, hoverformat: ",d", tickformat: ",d", ...(last <= (narrow ? 6 : 12) ? { tick0: 1, dtick: 1 } : { nticks: narrow ? 5 : 12 }),
        unifiedhovertitle: { text: "Batch %{x:,d}" } }),
      yaxis: axis({ title: { text: "Error in percent" }, range: [0, Math.min(tall * 1.06, 101)], automargin: false }) }), true);
    const seen = methods[0].time.window;
    const kinds = { running: seen > 1 ? `Mean of the last ${seen.toLocaleString("en")} batches in the same domain, all seeds together.` : "Each batch by itself, all seeds together.",
      cumulative: "Mean of all batches since the stream began, all seeds together." };
    part(i).querySelector("[data-note]").textContent =
      `${kinds[mode[i]]} ${sections[i].note} Press a name to bring its line to the front or send it back; drag over the plot to zoom, double-click to leave.`.replace("  ", " ");
  }

  // Cost against error: names are placed where they cover neither a point nor another name.
  function drawCost(i) {
    const node = place("cost", i), width = node.clientWidth, narrow = width < 600, height = narrow ? 360 : 440;
    const key = sections[i].relative ? "time" : "seconds_per_batch";
    const points = sections[i].methods.map((m) => ({ name: m.name, x: m.numbers[key], y: m.numbers.error, std: m.numbers.error_std }))
      .filter((p) => p.x > 0 && p.y !== null);
    if (!points.length) { node.textContent = "No method has both a finite error and a time."; return; }
    const margin = { l: 58, r: 12, t: 10, b: 52 };
    const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
    const log = Math.max(...xs) / Math.min(...xs) > 5, scale = log ? Math.log10 : (x) => x;
    const pad = (low, high, share, least) => { const by = Math.max((high - low) * share, least); return [low - by, high + by]; };
    const xr = pad(scale(Math.min(...xs)), scale(Math.max(...xs)), 0.1, log ? 0.05 : Math.max(...xs) * 0.1);
    const yr = pad(Math.min(...ys), Math.max(...ys), 0.1, 1);
    yr[0] = Math.max(yr[0], -1);
    const wide = width - margin.l - margin.r, high = height - margin.t - margin.b;
    const at = (p) => [(scale(p.x) - xr[0]) / (xr[1] - xr[0]) * wide, (yr[1] - p.y) / (yr[1] - yr[0]) * high];
    const taken = points.map((p) => { const [x, y] = at(p); return [x - 8, y - 8, x + 8, y + 8]; });
    const hits = (a) => a[0] < 2 || a[1] < 0 || a[2] > wide - 2 || a[3] > high || taken.some((b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]);
    const annotations = [];
    for (const p of points) {
      const text = short(p.name, 24), w = text.length * 7.2 + 6, h = 17, [x, y] = at(p);
      const ways = [];
      for (const far of [1, 2, 3.2, 4.6]) for (const [dx, dy] of [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]])
        ways.push([x + dx * (w / 2 + 10 + (far - 1) * 12), y + dy * (dx ? (far * 15) : 3 + far * 15), far]);
      const way = ways.find(([cx, cy]) => !hits([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]));
      if (!way) continue;
      const [cx, cy, far] = way;
      taken.push([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]);
      annotations.push({ text: plain(text), x: scale(p.x), y: p.y, ax: cx - x, ay: cy - y, axref: "pixel", ayref: "pixel",
        showarrow: true, arrowhead: 0, arrowwidth: far > 1 ? 1 : 0.01, arrowcolor: css("--soft"), standoff: 6,
        font: { size: 13, color: css("--text") }, bgcolor: css("--page"), borderpad: 1 });
    }
    let low = Infinity;
    const front = [...points].sort((a, b) => a.x - b.x || a.y - b.y).filter((p) => p.y < low && (low = p.y, true));
    const dots = points.map((p) => ({ type: "scatter", mode: "markers", x: [p.x], y: [p.y], name: plain(p.name),
      marker: { color: color(p.name), symbol: styles[p.name].symbol, size: 12, line: { color: css("--page"), width: 1 } },
      error_y: { type: "data", array: [p.std ?? 0], visible: p.std > 0, color: color(p.name), thickness: 1.2, width: 3 },
      hovertemplate: `<b>${plain(p.name)}</b><br>error ${p.y.toFixed(2)} %<br>${key === "time" ? p.x.toFixed(2) + " × the time of source" : (p.x * 1000).toFixed(1) + " ms per batch"}<extra></extra>` }));
    draw(node, [{ type: "scatter", mode: "lines", x: front.map((p) => p.x), y: front.map((p) => p.y), hoverinfo: "skip",
      line: { color: css("--soft"), width: 1, dash: "dot" } }, ...dots], layout({ height, margin, annotations,
      xaxis: axis({ title: { text: key === "time" ? `Seconds per batch, source = 1${log ? " (logarithmic)" : ""}` : "Seconds per batch" },
        type: log ? "log" : "linear", range: xr, fixedrange: true, automargin: false, ...(log ? ticks(xr, wide) : { nticks: narrow ? 5 : 10 }) }),
      yaxis: axis({ title: { text: "Mean error in percent" }, range: yr, fixedrange: true, automargin: false }) }), true);
  }
  function ticks([low, high], wide) {
    const all = [];
    for (let e = Math.floor(low); e <= Math.ceil(high); e++) for (const f of [1, 2, 5]) all.push(f * 10 ** e);
    const inside = all.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
    const step = Math.ceil((inside.length * 46) / wide);
    const kept = inside.filter((_, k) => k % step === 0);
    return { tickvals: kept, ticktext: kept.map((v) => String(Number(v.toPrecision(3)))) };
  }

  function drawPanel(i, j) {
    const node = place("panel", i, j), { name, bins } = sections[i].methods[j];
    const most = Math.max(...bins.map((b) => b.count), 1), small = node.clientWidth < 180;
    draw(node, [
      { type: "scatter", mode: "lines", x: [0, 1], y: [0, 1], hoverinfo: "skip", line: { color: css("--soft"), width: 1, dash: "dot" } },
      { type: "scatter", mode: "lines+markers", x: bins.map((b) => b.confidence), y: bins.map((b) => b.accuracy),
        line: { color: color(name), width: 1.6, dash: styles[name].dash }, customdata: bins.map((b) => b.count), cliponaxis: false,
        marker: { color: color(name), opacity: 1, size: bins.map((b) => 3 + 9 * Math.sqrt(b.count / most)) },
        hovertemplate: "confidence %{x:.2f}<br>accuracy %{y:.2f}<br>%{customdata:,d} samples<extra></extra>" },
    ], layout({ height: Math.min(node.clientWidth, 230), margin: { l: small ? 26 : 32, r: 8, t: 8, b: 24 },
      xaxis: axis({ range: [0, 1], tickvals: [0, 0.5, 1], fixedrange: true, automargin: false }),
      yaxis: axis({ range: [0, 1], tickvals: [0, 0.5, 1], fixedrange: true, automargin: false }) }), false);
  }

  function drawAll() {
    drawTime(shown);
    drawCost(shown);
    sections[shown].methods.forEach((_, j) => drawPanel(shown, j));
    root.dataset.drawn = shown;
  }
  function show(i) {
    shown = i;
    document.querySelectorAll("section.run").forEach((s, k) => { s.hidden = k !== i; });
    drawAll();
  }
  function sort(head) {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("[aria-sort]").forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => { const v = Number(row.cells[column].dataset.value); return Number.isFinite(v) ? v : (down ? -Infinity : Infinity); };
    body.append(...[...body.rows].sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b)) || 0));
  }

  document.querySelectorAll("section.run").forEach((section, i) => {
    section.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") !== "true");
      drawTime(i);
    }));
    section.querySelectorAll("[data-mode]").forEach((button) => button.addEventListener("click", () => {
      mode[i] = button.dataset.mode;
      section.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", b === button));
      drawTime(i);
    }));
    section.querySelectorAll(".summary thead button").forEach((b) => b.addEventListener("click", () => sort(b.closest("th"))));
  });

  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const named = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Switch to ${theme.textContent.toLowerCase()} colours`); };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; named(); drawAll(); });
  dark.addEventListener("change", () => { named(); drawAll(); });
  document.getElementById("picker")?.addEventListener("change", (event) => show(Number(event.target.value)));
  let width = innerWidth, timer;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(drawAll, 120);
  });
  named();
  show(0);
})();
