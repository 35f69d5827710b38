// The page: list of slides, layers over the slide, the patch that was clicked, annotations, sheet of patches.

import { DeepZoom } from "./deepzoom.js";

const $ = (id) => document.getElementById(id);
const [PRESENT, ABSTAINED, OOD, KNOWN] = [1, 2, 4, 8];
const VERDICT_COLOURS = { right: "#008a62", wrong: "#c24a00", unsure: "#7a5c00" };
const MARKS = { right: "✓", wrong: "✗", unsure: "?" };
const OOD_COLOUR = "#d6009f", NO_ANSWER = "the server does not answer: is `biopsy view` still running?";

let state, slide = null, layer = null, regions = null, chosen = null, annotations = [];
let sheet = null, jumps = { kind: null, order: [], next: 0 }, queueAt = -1;

// --- requests
async function ask(address, options) {
  const response = await fetch(address, options);
  if (!response.ok) throw new Error((await response.json().catch(() => ({ error: response.statusText }))).error);
  return response;
}
const getJson = async (address) => (await ask(address)).json();
function note(text) { $("note").textContent = text; $("note").hidden = !text; }
const guarded = (action) => async (...parameters) => {
  try { return await action(...parameters); } catch (error) { note(error.message); }
};

// --- the slide
const zoomer = new DeepZoom($("canvas"), {
  onClick: guarded(clickPlace), onDraw: guarded(annotateRegion), onChange: showPosition, paint: paintLayers,
});
zoomer.failed = note;

const openSlide = guarded(async (key, view) => {
  note("");
  const opened = await getJson(`api/slides/${key}`);
  [slide, layer, regions, chosen, jumps.kind] = [opened, null, null, null, null];
  showSheet(false);
  note(opened.notes.join(" "));
  zoomer.open(opened, (level, column, row) => `api/slides/${key}/tiles/${level}/${column}_${row}.jpg`, state.tile_px);
  if (view) zoomer.goTo(...view);
  for (const button of $("slides").querySelectorAll("button")) button.setAttribute("aria-current", button.value === key);
  $("patch").hidden = true;
  $("slides").querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest" });
  $("legend").replaceChildren();
  $("region-classes").replaceChildren();
  $("region-warning").hidden = true;
  $("map-controls").hidden = !opened.grid;
  $("no-map").hidden = Boolean(opened.grid);
  $("export-geojson").href = `api/export/${key}.geojson`;
  drawMinimap(key);
  if (opened.grid) await openLayer(key);
  await loadAnnotations();
  return true;
});

// Open the first slide that can be opened, the first of all at a view; returns why those before it could not.
async function openFirst(keys, view) {
  const reasons = [];
  for (const key of keys) {
    if (await openSlide(key, key === keys[0] ? view : undefined)) break;
    reasons.push($("note").textContent);
  }
  return reasons;
}

async function openLayer(key) {
  const { rows, columns, predicted, annotated } = slide.grid, { names, positive, threshold } = slide.labels;
  const buffer = await (await ask(`api/slides/${key}/layer`)).arrayBuffer();
  const size = rows * columns;
  layer = {
    probs: names.map((_, index) => new Float32Array(buffer, 4 * size * index, size)),
    flags: new Uint8Array(buffer, 4 * size * names.length, size),
    picture: Object.assign(document.createElement("canvas"), { width: columns, height: rows }),
  };
  layer.ood = [...layer.flags.keys()].filter((cell) => layer.flags[cell] & OOD);
  const shows = [predicted && ["prob", "probability"], predicted && ["pred", "predicted class"], annotated && ["truth", "annotated class"], predicted && annotated && ["errors", "errors"], ["none", "nothing"]].filter(Boolean);
  fill($("layer"), shows);
  fill($("class"), slide.labels.titles.map((title, index) => [index, title]), positive ?? 0);
  $("threshold").value = threshold ?? 0.5;
  for (const id of ["threshold", "class", "show-regions"]) $(id).closest("label").hidden = !predicted;
  $("show-abstained").closest("label").hidden = !layer.flags.some((flags) => flags & ABSTAINED);
  $("show-ood").closest("label").hidden = !layer.ood.length;
  $("jumps").hidden = !predicted;
  paintLayer();
  if ($("show-regions").checked) await loadRegions();
}

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, text]) => new Option(text, key)));
  if (value !== undefined) select.value = value;
}

// The decision of each cell at the threshold of the slider: the class, -1 where no patch was predicted.
function decide(cell) {
  const { positive } = slide.labels, { probs } = layer;
  if (Number.isNaN(probs[0][cell])) return -1;
  if (positive !== null) return probs[positive][cell] >= +$("threshold").value ? positive : 1 - positive;
  return probs.reduce((best, plane, index) => (plane[cell] > probs[best][cell] ? index : best), 0);
}

const truthOf = (flags) => (flags & KNOWN ? flags >> 4 : -1);
const rgb = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

// Colour the cells: the grid came once, so sliders recolour without asking the server.
function paintLayer() {
  if (!layer) return;
  const { probs, flags, picture } = layer, context = picture.getContext("2d");
  const image = context.createImageData(picture.width, picture.height), pixels = image.data;
  const show = $("layer").value, index = +$("class").value, map = state.colour_maps[$("colours").value];
  const threshold = +$("threshold").value, onlyPositive = $("only-positive").checked;
  for (const id of ["colours", "only-positive"]) $(id).closest("label").hidden = show !== "prob";
  const markAbstained = $("show-abstained").checked && show !== "none" && show !== "truth";
  const colours = slide.labels.colours.map(rgb), grey = rgb(slide.labels.abstained_colour);
  let above = 0, predicted = 0;
  for (let cell = 0; cell < flags.length; cell++) {
    if (!(flags[cell] & PRESENT)) continue;
    const prob = probs[index][cell], isPredicted = !Number.isNaN(prob), pred = decide(cell), truth = truthOf(flags[cell]);
    predicted += isPredicted;
    above += isPredicted && prob >= threshold;
    let colour = null;
    if (show === "prob" && isPredicted && (!onlyPositive || prob >= threshold)) colour = map[Math.round(255 * prob)];
    else if (show === "pred" && pred >= 0) colour = colours[pred];
    else if (show === "truth" && truth >= 0) colour = colours[truth];
    else if (show === "errors" && pred >= 0 && truth >= 0 && pred !== truth) colour = colours[pred];
    if (markAbstained && flags[cell] & ABSTAINED) colour = grey;
    if (colour) pixels.set([...colour, 255], 4 * cell);
  }
  context.putImageData(image, 0, 0);
  layer.painted = { above, predicted };
  $("threshold-value").textContent = threshold.toFixed(3);
  const mm2 = (slide.grid.cell * slide.mpp / 1000) ** 2;
  $("area").textContent = predicted ? `${slide.labels.titles[index]} at or above the threshold: ${(above * mm2).toPrecision(3)} mm² (${(100 * above / predicted).toFixed(1)} % of the predicted area)` : "";
  const warning = predicted && state.slides.find((entry) => entry.key === slide.key)?.warning;
  $("area-warning").hidden = !warning;
  $("area-warning").textContent = warning ? `${warning}.` : "";
  showLegend(markAbstained);
  zoomer.changed();
}

// What the colours over the slide mean.
function showLegend(markAbstained) {
  const show = $("layer").value, { titles, colours, abstained_colour: grey } = slide.labels, rows = [];
  const row = (background, text) => {
    const line = element("span", ""), swatch = Object.assign(element("i", ""), { className: "swatch" });
    swatch.style.background = background;
    line.append(swatch, text);
    rows.push(line);
  };
  if (show === "prob") {
    const bar = Object.assign(element("i", ""), { className: "colour-bar" }), map = state.colour_maps[$("colours").value];
    bar.style.background = `linear-gradient(90deg, ${[0, 64, 128, 192, 255].map((at) => `rgb(${map[at]})`)})`;
    const line = element("span", `P(${titles[$("class").value]})  0 `);
    line.append(bar, " 1");
    rows.push(line);
  } else if (show === "errors") titles.forEach((title, index) => row(colours[index], `predicted ${title}, annotated otherwise`));
  else if (show !== "none") titles.forEach((title, index) => row(colours[index], `${show === "truth" ? "annotated" : "predicted"} ${title}`));
  if (markAbstained && layer.flags.some((flags) => flags & ABSTAINED)) row(grey, "abstained");
  if (showsOod()) row(`repeating-linear-gradient(135deg, ${OOD_COLOUR} 0 2px, #fff 2px 5px)`, "out-of-distribution");
  $("legend").replaceChildren(...rows);
}

const showsOod = () => layer.ood.length > 0 && $("show-ood").checked && $("layer").value !== "none";

// Hatch the out-of-distribution cells in sight, so that what lies below stays visible.
function hatch(context, scale) {
  const { left, top, columns, cell } = slide.grid;
  const [x0, y0] = zoomer.toSlide(0, 0), [x1, y1] = zoomer.toSlide(zoomer.width, zoomer.height);
  context.beginPath();
  for (const index of layer.ood) {
    const x = left + (index % columns) * cell, y = top + Math.floor(index / columns) * cell;
    if (x > x1 || y > y1 || x + cell < x0 || y + cell < y0) continue;
    for (const [dx, dy] of [[0, 0.5], [0, 1], [0.5, 1]]) {
      context.moveTo(x + dx * cell, y + dy * cell);
      context.lineTo(x + dy * cell, y + dx * cell);
    }
  }
  context.lineWidth = 1.5 / scale;
  context.strokeStyle = OOD_COLOUR;
  context.stroke();
}

function paintLayers(context, scale, drawing) {
  if (layer) {
    const { left, top, columns, rows, cell } = slide.grid;
    context.globalAlpha = +$("opacity").value;
    context.imageSmoothingEnabled = false;
    context.drawImage(layer.picture, left, top, columns * cell, rows * cell);
    context.globalAlpha = 1;
    if (showsOod()) hatch(context, scale);
  }
  if (regions && $("show-regions").checked) paintRegions(context, scale);
  for (const annotation of annotations) if (annotation.slide === slide.name && annotation.polygon) paintAnnotation(context, scale, annotation);
  if (chosen?.box) {
    const [x, y, side] = chosen.box;
    context.lineWidth = 4 / scale; context.strokeStyle = "#fff"; context.strokeRect(x, y, side, side);
    context.lineWidth = 2 / scale; context.strokeStyle = "#000"; context.strokeRect(x, y, side, side);
  }
  if (drawing) trace(context, [drawing], 2 / scale, "#000");
}

function trace(context, rings, width, colour, dashes = []) {
  context.setLineDash(dashes);
  context.beginPath();
  for (const ring of rings) {
    ring.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath();
  }
  context.lineWidth = width;
  context.strokeStyle = colour;
  context.stroke();
  context.setLineDash([]);
}

// Whether the prediction of a region is not to be relied on.
const isUnlike = (region) => region.ood_share >= 0.5;

function paintRegions(context, scale) {
  const hidden = new Set([...$("region-classes").querySelectorAll("input:not(:checked)")].map((box) => box.value));
  const { names, colours, abstained_colour: grey } = slide.labels;
  for (const region of regions) {
    if (!hidden.has(region.class)) trace(context, region.rings, 2 / scale, colours[names.indexOf(region.class)] ?? grey, isUnlike(region) ? [8 / scale, 5 / scale] : []);
  }
}

function paintAnnotation(context, scale, annotation) {
  const colour = annotation.disagree ? "#000" : VERDICT_COLOURS[annotation.verdict];
  trace(context, [annotation.polygon], 3 / scale, colour);
  const [x, y] = annotation.polygon[0], size = 14 / scale;
  context.fillStyle = colour;
  context.fillRect(x, y, size * 1.3, size * 1.3);
  context.fillStyle = "#fff";
  context.font = `bold ${size}px system-ui`;
  context.fillText(annotation.disagree ? "≠" : MARKS[annotation.verdict], x + size * 0.2, y + size);
}

async function loadRegions() {
  regions = await getJson(`api/slides/${slide.key}/regions`);
  const classes = [...new Set(regions.map((region) => region.class))];
  $("region-classes").replaceChildren(...classes.map((name) => {
    const label = document.createElement("label"), box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true, value: name });
    box.addEventListener("change", () => zoomer.changed());
    const swatch = Object.assign(document.createElement("i"), { className: "swatch" });
    swatch.style.background = slide.labels.colours[slide.labels.names.indexOf(name)] ?? slide.labels.abstained_colour;
    const unlike = regions.filter((region) => region.class === name && isUnlike(region)).length;
    const title = titleOf(name).replace(/\*$/, "");  // the star is for QuPath
    label.append(box, swatch, unlike ? `${title} (${unlike} dashed)` : title);
    return label;
  }));
  $("region-warning").hidden = !regions.some(isUnlike);
  zoomer.changed();
}

// --- where we are: scale bar, um/px, minimap, address
function showPosition() {
  const umPerPx = slide.mpp / zoomer.scale, target = 120 * umPerPx;
  const power = 10 ** Math.floor(Math.log10(target)), length = power * [5, 2, 1].find((step) => step * power <= target);
  $("scale-bar").style.width = `${length / umPerPx}px`;
  $("scale-text").textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  $("resolution").textContent = `screen ${umPerPx.toPrecision(3)} µm/px,\n slide ${slide.mpp.toPrecision(3)} µm/px`;
  paintMinimap();
  history.replaceState(null, "", `#${slide.key}/${Math.round(zoomer.x)}/${Math.round(zoomer.y)}/${zoomer.scale.toPrecision(4)}`);
}

const minimap = { image: null };
function drawMinimap(key) {
  const canvas = $("minimap"), fit = 160 / Math.max(slide.width, slide.height);
  canvas.width = Math.max(1, Math.round(slide.width * fit));
  canvas.height = Math.max(1, Math.round(slide.height * fit));
  minimap.image = new Image();
  minimap.image.onload = paintMinimap;
  minimap.image.src = `api/slides/${key}/thumbnail.jpg`;
}

function paintMinimap() {
  const canvas = $("minimap"), context = canvas.getContext("2d"), fit = canvas.width / slide.width;
  if (minimap.image?.complete && minimap.image.naturalWidth) context.drawImage(minimap.image, 0, 0, canvas.width, canvas.height);
  const [left, top] = zoomer.toSlide(0, 0);
  context.strokeStyle = "#c24a00";
  context.lineWidth = 2;
  context.strokeRect(left * fit, top * fit, zoomer.width / zoomer.scale * fit, zoomer.height / zoomer.scale * fit);
}

function followMinimap(event) {
  if (!slide || (event.type === "pointermove" && !event.buttons)) return;
  zoomer.goTo(event.offsetX / $("minimap").clientWidth * slide.width, event.offsetY / $("minimap").clientHeight * slide.height);
}

// --- a patch
async function clickPlace(x, y) {
  const regionsHere = annotations.filter((annotation) => annotation.region && annotation.slide === slide.name && annotation.polygon);
  const flag = 20 / zoomer.scale;  // a region is chosen by the flag at its first corner
  const flagged = regionsHere.find(({ polygon: [[left, top]] }) => x >= left && y >= top && x < left + flag && y < top + flag);
  const response = flagged || !slide.grid ? null : await fetch(`api/slides/${slide.key}/patch?x=${x}&y=${y}`);
  if (response?.ok) chosen = await response.json();
  else if (response && response.status !== 404) throw new Error((await response.json()).error);
  else {
    const region = flagged ?? regionsHere.find((annotation) => inside(annotation.polygon, x, y));
    chosen = region ? { place: slide.key, region: region.target, polygon: region.polygon, target: region.target } : null;
  }
  showPatch();
  if (!chosen) return;
  openPanel();
  const covered = getComputedStyle($("panel")).position === "absolute" ? $("panel").offsetHeight : 0;
  const [, screenY] = zoomer.toScreen(x, y), room = zoomer.height - covered;
  if (covered && screenY > 0.8 * room) zoomer.pan(0, screenY - room / 2);  // or the panel would hide the patch
}

function inside(polygon, x, y) {
  let within = false;
  polygon.forEach(([x1, y1], index) => {
    const [x2, y2] = polygon.at(index - 1);
    if (y1 > y !== y2 > y && x < ((x2 - x1) * (y - y1)) / (y2 - y1) + x1) within = !within;
  });
  return within;
}

function showPatch() {
  $("patch").hidden = !chosen;
  $("explanation").replaceChildren();
  zoomer.changed();
  if (!chosen) return;
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const facts = [
    [chosen.region ? "region" : "patch", chosen.patch_id ?? (chosen.region ? "drawn" : null)],
    ["x, y (px)", chosen.x !== undefined ? `${chosen.x}, ${chosen.y}` : null],
    ...Object.entries(chosen.probs ?? {}).map(([name, prob]) => [`P(${titleOf(name)})`, prob.toFixed(4)]),
    chosen.pred && ["threshold", chosen.threshold?.toFixed(3) ?? null],
    chosen.pred && ["predicted", titleOf(chosen.pred) + (chosen.abstained ? " (abstained)" : "")],
    chosen.set && ["prediction set", chosen.set.length ? chosen.set.map(titleOf).join(", ") : "empty"],
    chosen.label && ["annotated", titleOf(chosen.label)],
    chosen.ood !== null && chosen.ood !== undefined && ["out-of-distribution", chosen.ood ? "yes" : "no"],
    ...["patient_id", "subset", "doubt"].map((name) => chosen.columns?.[name] != null && [name.replace("_", " "), typeof chosen.columns[name] === "number" ? percent(chosen.columns[name]) : chosen.columns[name]]),
    ...annotations.filter((annotation) => annotation.target === chosen.target).map((annotation) => ["annotation", `${annotation.disagree ? annotation.reason : annotation.label ? titleOf(annotation.label) : annotation.verdict} (${annotation.who.join(", ")})`]),
  ].filter((fact) => fact && fact[1] !== null);
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  const onSheet = chosen.columns !== undefined;
  $("patch-image").hidden = !onSheet;
  if (onSheet) $("patch-image").src = `api/sheets/${chosen.place}/patches/${chosen.patch}.jpg`;
  $("explain").hidden = !state.explains || chosen.region !== undefined;
  $("no-model").hidden = state.explains || chosen.region !== undefined;
  $("go-to-slide").hidden = !chosen.on_slide;
  $("classes").replaceChildren(...classNames().map((name, index) => {
    const button = element("button", "");
    button.append(element("kbd", index + 1), ` ${titleOf(name)}`);
    button.addEventListener("click", guarded(() => annotate({ label: name })));
    return button;
  }));
  $("patch").scrollIntoView({ block: "nearest" });
}

const shownLabels = () => (sheet && !$("sheet").hidden ? sheet.labels : slide?.labels);
const classNames = () => shownLabels()?.names ?? [];
// A class as readers see it; requests and answers name it as the files do.
const titleOf = (name) => shownLabels()?.titles[classNames().indexOf(name)] ?? name;
const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

async function explain() {
  const kind = chosen.columns !== undefined ? "sheets" : "slides", asked = chosen;
  $("explanation").textContent = "computing …";
  const found = await getJson(`api/${kind}/${chosen.place}/explain/${chosen.patch}`);
  if (chosen !== asked) return;
  const figure = (source, caption, large) => {
    const figure = element("figure", "");
    figure.className = large ? "large" : "";
    figure.append(Object.assign(new Image(), { src: source, alt: "" }), element("figcaption", caption));
    return figure;
  };
  $("explanation").replaceChildren(figure(found.image, "patch", true), figure(found.saliency, `saliency of ${titleOf(found.class)}: yellow where a pixel changes its score most`, true));
  for (const kind of found.ood ? ["colour", "feature"] : []) {  // from training, as multiples of the limit
    const distance = found.ood[`${kind}_distance`];
    if (distance != null) $("facts").append(element("dt", `${kind} distance`), element("dd", `${distance.toFixed(2)} × limit`));
  }
  const waiting = element("p", found.nearest ? "nearest training patches: computing …" : "");
  $("explanation").append(waiting);
  $("explanation").scrollIntoView({ block: "nearest" });
  if (!found.nearest) return;
  const nearest = await getJson(found.nearest);
  if (chosen !== asked) return;
  waiting.replaceWith(...nearest.map((item) => figure(item.image, `nearest training patch: ${titleOf(item.class)}, patient ${item.patient_id ?? "?"}, distance ${item.distance.toFixed(2)}`)));
  $("explanation").scrollIntoView({ block: "nearest" });
}

// --- jumps
function jump(kind) {
  if (!layer) return;
  const threshold = +$("threshold").value, index = +$("class").value;
  if (jumps.kind !== kind) {
    const { columns } = slide.grid, probs = layer.probs[index];
    const cells = [...layer.flags.keys()].filter((cell) => !Number.isNaN(probs[cell]));
    const around = (cell) => {
      const near = [-1, 1, -columns, columns].map((step) => probs[cell + step]).filter((prob) => prob >= 0);
      return near.length ? Math.abs(probs[cell] - near.reduce((sum, prob) => sum + prob, 0) / near.length) : 0;
    };
    const truth = (cell) => truthOf(layer.flags[cell]);
    const score = {
      surest: (cell) => probs[cell],
      uncertain: (cell) => -Math.abs(probs[cell] - threshold),
      // against the annotation where there is one, else against the neighbours, out-of-distribution first
      surprising: (cell) => (truth(cell) >= 0 ? Math.abs(probs[cell] - (truth(cell) === index)) : around(cell) + Boolean(layer.flags[cell] & OOD)),
    }[kind];
    const scored = cells.map((cell) => [score(cell), cell]).sort(([one], [other]) => other - one);
    jumps = { kind, order: scored.slice(0, 500).map(([, cell]) => cell), next: 0 };
  }
  if (!jumps.order.length) return;
  $("jump-place").textContent = `${(jumps.next % jumps.order.length) + 1} of ${jumps.order.length}`;
  const cell = jumps.order[jumps.next++ % jumps.order.length], { left, top, columns, cell: side } = slide.grid;
  const x = left + ((cell % columns) + 0.5) * side, y = top + (Math.floor(cell / columns) + 0.5) * side;
  zoomer.goTo(x, y, Math.max(zoomer.scale, 80 / side));
  return clickPlace(x, y);
}

// --- annotations
const loadAnnotations = async () => takeAnnotations(await getJson("api/annotations"));

function takeAnnotations(answer) {
  annotations = answer.annotations;
  const count = (verdict) => annotations.filter((annotation) => annotation.verdict === verdict && !annotation.disagree).length;
  const disagree = annotations.filter((annotation) => annotation.disagree).length;
  $("annotation-count").textContent = `${count("right")} right, ${count("wrong")} wrong, ${count("unsure")} unsure${disagree ? `, ${disagree} disputed` : ""}`;
  markSheet();
  zoomer.changed();
}

async function annotate(annotation) {
  if (!chosen) return;
  const body = { place: chosen.place, who: $("who").value, ...annotation };
  if (chosen.region) Object.assign(body, { region: chosen.region, polygon: chosen.polygon });
  else body.patch = chosen.patch;
  const target = chosen;
  takeAnnotations(await (await ask("api/annotations", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) })).json());
  if (chosen === target) showPatch();
}

async function annotateRegion(polygon) {
  if (polygon.length < 3) return;
  const identity = crypto.randomUUID?.() ?? `${Date.now()}-${Math.floor(Math.random() * 1e9)}`;
  chosen = { place: slide.key, region: `region-${identity}`, target: `region-${identity}`, polygon };
  setDrawing(false);
  await annotate({ verdict: "unsure" });
  openPanel();
}

function setDrawing(on) {
  zoomer.drawMode = on;
  $("draw").setAttribute("aria-pressed", on);
  $("canvas").classList.toggle("drawing", on);
}

// --- the sheet of patches
function showSheet(on) {
  $("sheet").hidden = !on;
  $("stage").hidden = on;
  $("layers").hidden = on;
  $("annotating").querySelector("#draw").hidden = on;
  $("title").textContent = [state.title, on ? "patches" : slide?.name].filter(Boolean).join(" · ");
  $("export-geojson").hidden = on;
  $("show-sheet").textContent = on ? "Back" : "Patches";
  $("show-sheet").title = on ? "Back to the slide" : "Sheet of patches";
  $("show-sheet").hidden = on ? !slide : !state.sheets.length;
}

const openSheet = guarded(async (key) => {
  sheet = { key, patches: [], labels: null };
  $("patches").replaceChildren();
  $("sort-column").value = $("filter-value").value = "";  // the sheet before may have had other columns
  $("sort-descending").checked = false;
  showSheet(true);
  chosen = null;
  showPatch();
  $("export-labels").href = `api/export/${key}.csv`;
  await loadPatches();
  await loadAnnotations();
});

async function loadPatches() {
  const query = new URLSearchParams({ offset: sheet.patches.length, sort: $("sort-column").value, descending: $("sort-descending").checked, column: $("filter-value").value ? $("filter-column").value : "", value: $("filter-value").value });
  const asked = sheet, at = sheet.patches, offset = at.length, page = await getJson(`api/sheets/${sheet.key}?${query}`);
  if (sheet !== asked || sheet.patches !== at || at.length !== offset) return;  // something else is wanted by now
  if (!sheet.labels) {
    sheet.labels = page.labels;
    sheet.values = page.values;
    fill($("sort-column"), [...(page.columns.includes("error") ? [["", "evaluated patches first"]] : []), ["row", "as in the pack"], ...page.columns.map((name) => [name, name])]);
    fill($("filter-column"), page.columns.map((name) => [name, name]), "label");
    offerValues();
  }
  sheet.patches.push(...page.patches);
  $("sheet-count").textContent = `${page.total.toLocaleString()} patches`;
  $("sheet-help").textContent = page.total
    ? `Below each patch: annotated class${page.columns.includes("pred") ? " → predicted class, where they differ in red; p is the probability of " + (page.labels.positive === null ? "the predicted class" : page.labels.titles[page.labels.positive]) : ""}.${page.columns.includes("doubt") ? " Sort by doubt for probable label errors." : ""}`
    : `No patch has ${$("filter-column").value} “${$("filter-value").value}”. Empty the field to see all patches.`;
  $("more").hidden = sheet.patches.length >= page.total;
  $("patches").append(...page.patches.map(makeTile));
  markSheet();
}

function offerValues() {
  $("filter-values").replaceChildren(...(sheet.values[$("filter-column").value] ?? []).map((value) => new Option(titleOf(value), value)));
}

const reloadPatches = guarded(async () => {
  sheet.patches = [];
  $("patches").replaceChildren();
  await loadPatches();
});

function makeTile(patch) {
  const tile = element("button", "");
  tile.className = patch.error ? "patch error" : "patch";
  tile.value = patch.row;
  tile.dataset.target = patch.patch_id;
  tile.append(Object.assign(new Image(), { src: `api/sheets/${sheet.key}/patches/${patch.row}.jpg`, loading: "lazy", alt: patch.patch_id }));
  tile.append(element("span", [patch.label, patch.pred].filter(Boolean).map(titleOf).join(" → ")));
  if (patch.prob !== null && patch.prob !== undefined) tile.append(element("span", `p ${patch.prob.toFixed(3)}`));
  tile.addEventListener("click", guarded(() => choosePatch(sheet.key, patch.row)));
  return tile;
}

async function choosePatch(key, row) {
  chosen = await getJson(`api/sheets/${key}/patches/${row}`);
  for (const tile of $("patches").children) tile.classList.toggle("chosen", +tile.value === row);
  showPatch();
  openPanel();
}

function markSheet() {
  const verdicts = new Map(annotations.map((annotation) => [annotation.target, annotation.verdict]));
  for (const tile of $("patches").children) {
    for (const verdict of Object.keys(MARKS)) tile.classList.toggle(verdict, verdicts.get(tile.dataset.target) === verdict);
  }
}

// --- the queue of patches to label
const nextInQueue = guarded(async () => {
  queueAt = (queueAt + 1) % state.queue.length;
  const item = state.queue[queueAt];
  $("queue-place").textContent = `${queueAt + 1} of ${state.queue.length}: ${item.reason ?? ""}`;
  if (item.slide_key) {
    if (slide?.key !== item.slide_key) await openSlide(item.slide_key);
    showSheet(false);
    const x = item.x + item.side / 2, y = item.y + item.side / 2;
    zoomer.goTo(x, y, Math.min(4, 160 / item.side));
    await clickPlace(x, y);
  } else {
    if (sheet?.key !== item.place || $("sheet").hidden) await openSheet(item.place);
    await choosePatch(item.place, item.patch);
  }
});

// --- lists, keys, start
function listSlides() {
  const by = $("sort-slides").value, slides = [...state.slides];
  slides.sort((one, other) => (by === "name" ? one.name.localeCompare(other.name, undefined, { numeric: true }) : (other[by] ?? -1) - (one[by] ?? -1)));
  $("slides").replaceChildren(...slides.map((entry) => {
    const item = element("li", ""), button = element("button", entry.name);
    button.value = entry.key;
    button.setAttribute("aria-current", entry.key === slide?.key);
    const percent = (value, what) => (value == null ? null : `${(100 * value).toFixed(1)} % ${what}`);
    const facts = [entry.positive_mm2 != null && `${entry.positive_mm2.toPrecision(3)} mm² ${entry.positive}${entry.warning ? " (not to be relied on)" : ""}`, percent(entry.abstained_share, "abstained"), percent(entry.ood_share, "out-of-distribution"), entry.n_errors != null && `${entry.n_errors} ${entry.n_errors === 1 ? "error" : "errors"}`, entry.n_errors === null && "not predicted", entry.n_patches && `${entry.n_patches.toLocaleString()} patches`];
    button.append(element("small", facts.filter(Boolean).join(", ")));
    button.addEventListener("click", () => { openSlide(entry.key); togglePart("list", false); });
    item.append(button);
    return item;
  }));
}

function togglePart(id, on = !$(id).classList.contains("open")) {
  for (const part of ["list", "panel"]) {
    $(part).classList.toggle("open", part === id && on);
    $(`show-${part}`).setAttribute("aria-expanded", part === id && on);
  }
}
function openPanel() {
  togglePart("panel", true);
  $("patch").scrollIntoView({ block: "nearest" });
}

function press(event) {
  if (event.target.matches("input:not([type=range]):not([type=checkbox]), select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase(), names = classNames();
  const verdict = { r: "right", w: "wrong", u: "unsure", backspace: "removed", delete: "removed" }[key];
  const onCanvas = document.activeElement === $("canvas");
  const moves = { arrowleft: [-60, 0], arrowright: [60, 0], arrowup: [0, -60], arrowdown: [0, 60] };
  let action = null;
  if (verdict) action = () => annotate({ verdict });
  else if (names[+key - 1]) action = () => annotate({ label: names[+key - 1] });
  else if (key === "d" && slide) action = () => setDrawing(!zoomer.drawMode);
  else if (key === "n" && state.queue.length) action = nextInQueue;
  else if (key === "?") action = () => { openPanel(); $("keys").open = !$("keys").open; $("keys").scrollIntoView({ block: "nearest" }); };
  else if (key === "escape") action = () => { chosen = null; setDrawing(false); showPatch(); };
  else if (onCanvas && moves[key]) action = () => zoomer.pan(...moves[key]);
  else if (onCanvas && (key === "+" || key === "=")) action = () => zoomer.zoom(1.5);
  else if (onCanvas && key === "-") action = () => zoomer.zoom(1 / 1.5);
  else if (onCanvas && key === "0") action = () => zoomer.home();
  if (action) { event.preventDefault(); guarded(action)(); }
}

function listen() {
  for (const id of ["layer", "class", "colours", "threshold", "only-positive", "show-abstained", "show-ood"]) $(id).addEventListener("input", () => { jumps.kind = null; paintLayer(); });
  $("opacity").addEventListener("input", () => zoomer.changed());
  $("show-regions").addEventListener("change", guarded(() => ($("show-regions").checked && !regions ? loadRegions() : zoomer.changed())));
  $("zoom-in").addEventListener("click", () => zoomer.zoom(1.5));
  $("zoom-out").addEventListener("click", () => zoomer.zoom(1 / 1.5));
  $("zoom-home").addEventListener("click", () => zoomer.home());
  for (const kind of ["pointerdown", "pointermove"]) $("minimap").addEventListener(kind, followMinimap);
  for (const button of document.querySelectorAll("[data-jump]")) button.addEventListener("click", guarded(() => jump(button.dataset.jump)));
  for (const button of document.querySelectorAll("[data-verdict]")) button.addEventListener("click", guarded(() => annotate({ verdict: button.dataset.verdict })));
  $("explain").addEventListener("click", guarded(explain));
  $("go-to-slide").addEventListener("click", guarded(async () => {
    const { key, box: [x, y, side] } = chosen.on_slide;
    if (slide?.key !== key) await openSlide(key);
    showSheet(false);
    zoomer.goTo(x + side / 2, y + side / 2, Math.min(4, 160 / side));
    await clickPlace(x + side / 2, y + side / 2);
  }));
  $("draw").addEventListener("click", () => setDrawing(!zoomer.drawMode));
  $("sort-slides").addEventListener("change", listSlides);
  $("show-sheet").addEventListener("click", () => ($("sheet").hidden ? openSheet($("sheet-choice").value) : slide ? showSheet(false) : null));
  $("sheet-choice").addEventListener("change", () => { $("patches").replaceChildren(); openSheet($("sheet-choice").value); });
  for (const id of ["sort-column", "sort-descending", "filter-column", "filter-value"]) $(id).addEventListener("change", () => { offerValues(); reloadPatches(); });
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", guarded(loadPatches));
  $("queue-next").addEventListener("click", nextInQueue);
  for (const part of ["list", "panel"]) $(`show-${part}`).addEventListener("click", () => togglePart(part));
  $("who").addEventListener("change", () => localStorage.setItem("reviewer", $("who").value));
  document.addEventListener("keydown", press);
  setInterval(() => { if (!document.hidden) loadAnnotations().then(() => { if ($("note").textContent === NO_ANSWER) note(""); }, () => note(NO_ANSWER)); }, 15000);
}

guarded(async () => {
  state = await getJson("api/state");
  document.title = `${state.title} · biopsy`;
  $("title").textContent = state.title;
  $("report").hidden = !state.report;
  $("who").value = localStorage.getItem("reviewer") ?? state.who;
  fill($("colours"), Object.keys(state.colour_maps).map((name) => [name, name]));
  fill($("sheet-choice"), state.sheets.map(({ key, name }) => [key, name]));
  $("sheet-choice").hidden = state.sheets.length < 2;
  $("show-sheet").hidden = !state.sheets.length;
  $("no-slides").hidden = state.slides.length > 0;
  for (const option of $("sort-slides").options) option.hidden = option.value !== "name" && state.slides.every((entry) => entry[option.value] == null);
  $("queue-panel").hidden = !state.queue.length;
  $("queue-place").textContent = `${state.queue.length} patches`;
  listen();
  listSlides();
  const [key, ...view] = location.hash.slice(1).split("/");
  const wanted = state.slides.find((entry) => entry.key === key);
  const listed = [...$("slides").querySelectorAll("button")].map((button) => button.value);
  const keys = wanted ? [wanted.key, ...listed.filter((other) => other !== wanted.key)] : listed;
  const unopened = await openFirst(keys, wanted && view.length === 3 ? view.map(Number) : undefined);
  if (!keys.length && state.sheets.length) await openSheet(state.sheets[0].key);
  const warnings = [...state.notes, state.writable ? "" : `${state.annotations} cannot be written: annotations are not kept; name a file with --annotations`, ...unopened, ...(slide?.notes ?? [])];
  note(warnings.filter(Boolean).join(" "));
  document.body.dataset.ready = "yes";
})();
