// Points on a canvas: drawn, moved, zoomed, found under the pointer and by arrow keys. It knows nothing of what they are.

const NEAR = 12; // pixels from a point within which it is meant
const MOST_ZOOM = 400;
const LABELLED = 4; // found points that are named
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Plot {
  // `acts`: hovered(number or -1, x, y), picked(number), reached(number) by keys. Points have x, y, colour, label.
  constructor(canvas, acts) {
    this.canvas = canvas;
    this.acts = acts;
    this.points = []; // the sample, in random order
    this.found = []; // drawn above it, with rings
    this.only = null; // a colour: the others are faint
    this.current = null; // the point that is meant
    this.view = { zoom: 1, x: 0, y: 0 };
    this.pointers = new Map();
    this.sprites = new Map();
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => acts.hovered(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  // `stays`: what is seen, since the points lie where they lay.
  show(points, stays) {
    this.points = points;
    this.found = [];
    this.current = null;
    this.only = null;
    const within = (values) => {
      const sorted = Float64Array.from(values).sort();
      const share = (part) => sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
      return sorted.length ? [share(0.002), share(0.998)] : [0, 1];
    };
    this.bounds = { x: within(points.map((point) => point.x)), y: within(points.map((point) => point.y)) };
    if (stays) this.draw();
    else this.whole();
  }

  whole() {
    this.view = { zoom: 1, x: (this.bounds.x[0] + this.bounds.x[1]) / 2, y: (this.bounds.y[0] + this.bounds.y[1]) / 2 };
    this.draw();
  }

  // Pixels a unit, and where a point is on the canvas.
  get scale() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const size = (axis) => Math.max(this.bounds[axis][1] - this.bounds[axis][0], 1e-9);
    return this.view.zoom * Math.min((width - 40) / size("x"), (height - 40) / size("y"));
  }

  placed(point) {
    const scale = this.scale;
    return [this.canvas.clientWidth / 2 + (point.x - this.view.x) * scale, this.canvas.clientHeight / 2 - (point.y - this.view.y) * scale];
  }

  // About a place on the canvas; without one about the point that is meant, else about the middle.
  zoom(factor, ...place) {
    const middle = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2];
    const [atX, atY] = place.length ? place : this.current ? this.placed(this.current) : middle;
    const before = this.scale;
    this.view.zoom = Math.min(MOST_ZOOM, Math.max(0.5, this.view.zoom * factor));
    const after = this.scale; // what is under the pointer stays there
    this.view.x += (atX - this.canvas.clientWidth / 2) * (1 / before - 1 / after);
    this.view.y -= (atY - this.canvas.clientHeight / 2) * (1 / before - 1 / after);
    this.draw();
  }

  pan(right, down) {
    this.view.x -= right / this.scale;
    this.view.y += down / this.scale;
    this.draw();
  }

  draw() {
    if (this.drawing || !this.bounds) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      this.paint();
    });
  }

  paint() {
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const radius = Math.min(7, (this.points.length > 20000 ? 1.3 : this.points.length > 3000 ? 1.9 : 3.2) * Math.sqrt(Math.sqrt(this.view.zoom)));
    const faint = this.found.length ? 0.35 : 0.8;
    const scale = this.scale;
    for (const point of this.points) {
      const x = width / 2 + (point.x - this.view.x) * scale;
      const y = height / 2 - (point.y - this.view.y) * scale;
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      pen.globalAlpha = this.only !== null && point.colour !== this.only ? 0.07 : this.only !== null ? 0.9 : faint;
      const sprite = this.sprite(point.colour, radius, ratio);
      pen.drawImage(sprite, x - sprite.half, y - sprite.half, 2 * sprite.half, 2 * sprite.half);
    }
    pen.globalAlpha = 1;
    const style = getComputedStyle(canvas);
    this.paintFound(pen, radius, style);
  }

  paintFound(pen, radius, style) {
    const ink = style.color, paper = style.backgroundColor;
    const ring = (point, size, wide) => {
      const [x, y] = this.placed(point);
      pen.beginPath();
      pen.arc(x, y, size, 0, 2 * Math.PI);
      pen.fillStyle = point.colour;
      pen.fill();
      pen.lineWidth = wide + 2;
      pen.strokeStyle = paper;
      pen.stroke();
      pen.lineWidth = wide;
      pen.strokeStyle = ink;
      pen.stroke();
    };
    for (const point of [...this.found].reverse()) ring(point, Math.max(4, radius + 1.5), 1.4);
    if (this.current) ring(this.current, Math.max(6.5, radius + 4), 2.2);
    const named = [...(this.current ? [this.current] : []), ...this.found.slice(0, LABELLED)];
    const taken = [];
    pen.font = `600 12px ${style.fontFamily}`;
    pen.lineWidth = 4;
    pen.lineJoin = "round";
    pen.textBaseline = "middle";
    for (const point of new Set(named)) {
      const [x, y] = this.placed(point);
      const words = point.label.length > 30 ? `${point.label.slice(0, 29)}…` : point.label;
      const wide = pen.measureText(words).width;
      const left = x + 11 + wide > this.canvas.clientWidth ? x - 11 - wide : x + 11;
      if (taken.some(([l, t, w]) => Math.abs(t - y) < 16 && left < l + w && l < left + wide)) continue;
      taken.push([left, y, wide]);
      pen.strokeStyle = paper;
      pen.strokeText(words, left, y);
      pen.fillStyle = ink;
      pen.fillText(words, left, y);
    }
  }

  // A dot of a colour, drawn once.
  sprite(colour, radius, ratio) {
    const name = `${colour} ${radius.toFixed(1)} ${ratio}`;
    if (!this.sprites.has(name)) {
      if (this.sprites.size > 500) this.sprites.clear();
      const half = Math.ceil(radius) + 1;
      const dot = document.createElement("canvas");
      dot.width = dot.height = 2 * half * ratio;
      dot.half = half;
      const pen = dot.getContext("2d");
      pen.scale(ratio, ratio);
      pen.fillStyle = colour;
      pen.arc(half, half, radius, 0, 2 * Math.PI);
      pen.fill();
      this.sprites.set(name, dot);
    }
    return this.sprites.get(name);
  }

  // The point under the pointer; one that was found before others.
  under(x, y) {
    let best = null, least = NEAR * NEAR;
    for (const points of [this.found, this.points]) {
      for (const point of points) {
        if (this.only !== null && point.colour !== this.only && points === this.points) continue;
        const [a, b] = this.placed(point);
        const distance = (a - x) ** 2 + (b - y) ** 2;
        if (distance < least) [best, least] = [point, distance];
      }
      if (best) return best;
    }
    return null;
  }

  // The nearest point in a direction, from the one that is meant, else from the middle.
  next([right, down]) {
    const [x, y] = this.current ? this.placed(this.current) : [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2];
    let best = null, least = Infinity;
    for (const point of this.found.length ? this.found : this.points) {
      if (point === this.current || (this.only !== null && point.colour !== this.only)) continue;
      const [a, b] = this.placed(point);
      const along = (a - x) * right + (b - y) * down;
      const aside = Math.abs((a - x) * down + (b - y) * right);
      if (along <= 0.5 || aside > 2 * along) continue;
      if (along + 2 * aside < least) [best, least] = [point, along + 2 * aside];
    }
    return best;
  }

  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), event.offsetX, event.offsetY);
  }

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.moved = 0;
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      const point = this.under(event.offsetX, event.offsetY);
      return this.acts.hovered(point, event.offsetX, event.offsetY);
    }
    const [right, down] = [event.offsetX - before[0], event.offsetY - before[1]];
    this.moved += Math.abs(right) + Math.abs(down);
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const apart = (x, y) => Math.hypot(x - other[0], y - other[1]) || 1;
      this.zoom(apart(event.offsetX, event.offsetY) / apart(...before), other[0], other[1]);
    } else if (this.moved > 3) {
      this.pan(right, down);
    }
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
  }

  up(event) {
    const was = this.pointers.delete(event.pointerId);
    if (!was || this.moved > 3 || event.type === "pointercancel") return;
    const point = this.under(event.offsetX, event.offsetY);
    if (point) this.acts.picked(point);
  }

  key(event) {
    const direction = KEYS[event.key];
    if (direction && event.shiftKey) this.pan(-60 * direction[0], -60 * direction[1]);
    else if (direction) this.reach(this.next(direction));
    else if (event.key === "+" || event.key === "=") this.zoom(1.5);
    else if (event.key === "-") this.zoom(1 / 1.5);
    else if (event.key === "0") this.whole();
    else if (event.key === "Enter" && this.current) this.acts.picked(this.current);
    else return;
    event.preventDefault();
  }

  reach(point) {
    if (!point) return;
    this.current = point;
    const [x, y] = this.placed(point);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (x < 20 || y < 20 || x > width - 20 || y > height - 20) this.pan(width / 2 - x, height / 2 - y);
    this.draw();
    this.acts.reached(point);
  }
}
