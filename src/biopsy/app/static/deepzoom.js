// A viewer of image pyramids on a canvas: drag, wheel, pinch and keys move it; tiles are asked for centre first.
// Places are pixels of the slide's level 0; `scale` is screen pixels per level-0 pixel.

const MAX_TILES = 500, MAX_REQUESTS = 8, MAX_ZOOM = 8, CLICK_PX = 5;

export class DeepZoom {
  constructor(canvas, { onClick, onChange, onDraw, paint }) {
    Object.assign(this, { canvas, onClick, onChange, onDraw, paint });
    this.context = canvas.getContext("2d");
    this.tiles = new Map();      // address -> { image, state, used }
    this.pointers = new Map();
    this.requests = 0;
    this.drawing = null;         // points of the region that is being drawn
    this.drawMode = false;
    this.slide = null;
    new ResizeObserver(() => this.resize()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => this.zoom(2, event.offsetX, event.offsetY));
  }

  open(slide, tileAddress, tilePx) {
    Object.assign(this, { slide, tileAddress, tilePx });
    this.tiles.clear();
    this.home();
  }

  get width() { return this.canvas.clientWidth; }
  get height() { return this.canvas.clientHeight; }

  home() {
    if (!this.slide) return;
    this.scale = 0.95 * Math.min(this.width / this.slide.width, this.height / this.slide.height);
    this.x = this.slide.width / 2;
    this.y = this.slide.height / 2;
    this.isHome = true;
    this.changed();
  }

  goTo(x, y, scale = this.scale) {
    Object.assign(this, { x, y, scale: this.clampScale(scale), isHome: false });
    this.changed();
  }

  clampScale(scale) {
    const whole = Math.min(this.width / this.slide.width, this.height / this.slide.height);
    return Math.max(Math.min(whole, 1) / 4, Math.min(MAX_ZOOM, scale));
  }

  zoom(factor, screenX = this.width / 2, screenY = this.height / 2) {
    if (!this.slide) return;
    const [x, y] = this.toSlide(screenX, screenY);
    this.isHome = false;
    this.scale = this.clampScale(this.scale * factor);
    this.x = x - (screenX - this.width / 2) / this.scale;
    this.y = y - (screenY - this.height / 2) / this.scale;
    this.changed();
  }

  pan(dx, dy) {
    if (!this.slide) return;
    this.isHome = false;
    this.x = Math.max(0, Math.min(this.slide.width, this.x + dx / this.scale));
    this.y = Math.max(0, Math.min(this.slide.height, this.y + dy / this.scale));
    this.changed();
  }

  toSlide(screenX, screenY) {
    return [this.x + (screenX - this.width / 2) / this.scale, this.y + (screenY - this.height / 2) / this.scale];
  }

  toScreen(x, y) {
    return [(x - this.x) * this.scale + this.width / 2, (y - this.y) * this.scale + this.height / 2];
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    if (this.isHome && this.width) this.home();
    this.draw();  // now: a canvas whose size was set is blank
  }

  // --- pointers
  down(event) {
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
    this.moved = this.pointers.size > 1 ? Infinity : 0;
    if (this.drawMode && this.pointers.size === 1) this.drawing = [this.toSlide(event.offsetX, event.offsetY)];
    else this.drawing = null;
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before || !this.slide) return;
    const now = { x: event.offsetX, y: event.offsetY };
    const step = Math.hypot(now.x - before.x, now.y - before.y);
    this.moved += step;
    if (this.drawing) {
      if (step < 2) return;
      this.drawing.push(this.toSlide(now.x, now.y));
      this.changed();
    } else if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const distance = (place) => Math.hypot(place.x - other.x, place.y - other.y);
      this.zoom(distance(now) / Math.max(1, distance(before)), (now.x + other.x) / 2, (now.y + other.y) / 2);
      this.pan((before.x - now.x) / 2, (before.y - now.y) / 2);
    } else {
      this.pan(before.x - now.x, before.y - now.y);
    }
    this.pointers.set(event.pointerId, now);
  }

  up(event) {
    if (!this.pointers.delete(event.pointerId) || !this.slide) return;
    if (this.drawing) {
      const points = this.drawing;
      this.drawing = null;
      if (points.length > 2 && this.moved > 4 * CLICK_PX) this.onDraw(simplify(points, 2 / this.scale));
    } else if (this.moved < CLICK_PX) this.onClick(...this.toSlide(event.offsetX, event.offsetY));
    this.changed();
  }

  // --- drawing
  changed() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  draw() {
    if (!this.slide || !this.width) return;
    const { context } = this, ratio = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#e8eaed";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const zoom = this.scale * ratio;
    context.setTransform(zoom, 0, 0, zoom, (this.width / 2 - this.x * this.scale) * ratio, (this.height / 2 - this.y * this.scale) * ratio);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, this.slide.width, this.slide.height);
    context.imageSmoothingEnabled = this.scale < 2;
    this.drawTiles(zoom);
    this.paint(context, this.scale, this.drawing);
    this.onChange();
  }

  visible(level) {
    const step = this.tilePx * 2 ** level;
    const [left, top] = this.toSlide(0, 0), [right, bottom] = this.toSlide(this.width, this.height);
    const last = (size) => Math.ceil(size / step) - 1;
    return {
      step,
      first: [Math.max(0, Math.floor(left / step)), Math.max(0, Math.floor(top / step))],
      last: [Math.min(last(this.slide.width), Math.floor(right / step)), Math.min(last(this.slide.height), Math.floor(bottom / step))],
    };
  }

  drawTiles(zoom) {
    const top = this.slide.levels - 1;
    const level = Math.max(0, Math.min(top, Math.floor(Math.log2(1 / zoom) + 0.3)));
    const missing = [];
    for (let coarse = top; coarse >= level; coarse--) {
      if (coarse !== level && coarse !== top && coarse > level + 3) continue;
      const { step, first, last } = this.visible(coarse);
      for (let row = first[1]; row <= last[1]; row++) {
        for (let column = first[0]; column <= last[0]; column++) {
          const tile = this.tiles.get(this.tileAddress(coarse, column, row));
          if (tile?.state === "ready") {
            tile.used = performance.now();
            this.context.drawImage(tile.image, column * step, row * step, tile.image.width * 2 ** coarse, tile.image.height * 2 ** coarse);
          } else if (!tile && (coarse === level || coarse === top)) {
            const far = Math.hypot((column + 0.5) * step - this.x, (row + 0.5) * step - this.y);
            missing.push({ address: this.tileAddress(coarse, column, row), order: coarse === top && top !== level ? -1 : far });
          }
        }
      }
    }
    missing.sort((one, other) => one.order - other.order);
    for (const { address } of missing) {
      if (this.requests >= MAX_REQUESTS) break;
      this.load(address);
    }
  }

  async load(address) {
    const tile = { state: "loading", used: performance.now() };
    this.tiles.set(address, tile);
    this.requests++;
    try {
      const response = await fetch(address);
      if (!response.ok) throw new Error((await response.json()).error);
      tile.image = await createImageBitmap(await response.blob());
      tile.state = "ready";
      this.trim();
    } catch (error) {
      tile.state = "failed";
      setTimeout(() => this.tiles.delete(address), 5000);  // then it is asked for again
      this.failed?.(error.message);
    }
    this.requests--;
    this.changed();
  }

  trim() {
    if (this.tiles.size <= MAX_TILES) return;
    const oldest = [...this.tiles].filter(([, tile]) => tile.state === "ready").sort(([, one], [, other]) => one.used - other.used);
    for (const [address, tile] of oldest.slice(0, this.tiles.size - MAX_TILES)) {
      tile.image.close();
      this.tiles.delete(address);
    }
  }
}

// Ramer, Douglas and Peucker: leave out points that lie within a tolerance of the line.
function simplify(points, tolerance) {
  if (points.length < 4) return points;
  const [first, last] = [points[0], points.at(-1)];
  const length = Math.hypot(last[0] - first[0], last[1] - first[1]);
  let far = 0, split = 0;
  for (let index = 1; index < points.length - 1; index++) {
    const [x, y] = points[index];
    const distance = length > tolerance  // else a closed outline: by the distance from where it begins
      ? Math.abs((last[0] - first[0]) * (first[1] - y) - (first[0] - x) * (last[1] - first[1])) / length
      : Math.hypot(x - first[0], y - first[1]);
    if (distance > far) [far, split] = [distance, index];
  }
  if (far <= tolerance) return [first, last];
  return [...simplify(points.slice(0, split + 1), tolerance).slice(0, -1), ...simplify(points.slice(split), tolerance)];
}
