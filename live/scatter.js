/* The scatter of image against text similarity: a sample of the gallery, the rows that are shown,
   and the line on which the method's score is that of one of them. */
"use strict";

/* The segments on which a grid of scores crosses a level, as [[x, y], [x, y]] in the grid's units.
   scores: the texts of the first image similarity, then of the next. */
function levelLine(grid, level) {
  const side = grid.text.length;
  const at = (i, j) => grid.scores[i * side + j];
  const segments = [];
  const between = (a, b, from, to) => from + (to - from) * ((level - a) / (b - a));
  for (let i = 0; i + 1 < grid.image.length; i += 1) {
    for (let j = 0; j + 1 < side; j += 1) {
      const corners = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]];
      const crossed = [];
      for (let c = 0; c < 4; c += 1) {
        const [one, two] = [corners[c], corners[(c + 1) % 4]];
        const [a, b] = [at(...one), at(...two)];
        if ((a < level) !== (b < level)) {
          crossed.push([
            between(a, b, grid.image[one[0]], grid.image[two[0]]),
            between(a, b, grid.text[one[1]], grid.text[two[1]]),
          ]);
        }
      }
      for (let c = 0; c + 1 < crossed.length; c += 2) segments.push([crossed[c], crossed[c + 1]]);
    }
  }
  return segments;
}

/* Draws on a canvas what `draw` is given, and finds the row under the pointer. */
class Scatter {
  constructor(canvas, onPoint) {
    this.canvas = canvas;
    this.shown = [];
    canvas.addEventListener("pointermove", (event) => onPoint(this.nearest(event)));
    canvas.addEventListener("pointerleave", () => onPoint(null));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    new ResizeObserver(() => this.redraw()).observe(canvas);
  }

  /* sample: {image, text, level}; rows: those shown, with image, text, score and row; lit: a row. */
  draw(sample, rows, lit) {
    this.given = [sample, rows, lit];
    this.redraw();
  }

  redraw() {
    if (!this.given || !this.canvas.clientWidth) return;
    const [sample, rows, lit] = this.given;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const color = (name) => getComputedStyle(this.canvas).getPropertyValue(`--${name}`).trim();
    const span = (name) => {
      const values = sample[name].concat(rows.map((row) => row[name]));
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const room = 0.04 * (high - low || 1);
      return [low - room, high + room];
    };
    const [across, up] = [span("image"), span("text")];
    const box = { left: 40, top: 6, right: width - 6, bottom: height - 34 };
    const x = (v) => box.left + ((v - across[0]) / (across[1] - across[0])) * (box.right - box.left);
    const y = (v) => box.bottom - ((v - up[0]) / (up[1] - up[0])) * (box.bottom - box.top);
    this.axes(pen, box, across, up, color);
    pen.save();
    pen.beginPath();
    pen.rect(box.left, box.top, box.right - box.left, box.bottom - box.top);
    pen.clip();
    const dot = (image, text, radius) => {
      pen.beginPath();
      pen.arc(x(image), y(text), radius, 0, 7);
      pen.fill();
    };
    pen.fillStyle = color("dot");
    sample.image.forEach((image, i) => dot(image, sample.text[i], 1.3));
    const last = rows.length && rows[rows.length - 1];
    if (sample.level && last) {
      pen.strokeStyle = color("text");
      pen.lineWidth = 1.5;
      pen.beginPath();
      for (const [from, to] of levelLine(sample.level, (lit || last).score)) {
        pen.moveTo(x(from[0]), y(from[1]));
        pen.lineTo(x(to[0]), y(to[1]));
      }
      pen.stroke();
    }
    pen.fillStyle = color("found");
    for (const row of rows) dot(row.image, row.text, 3);
    if (lit) {
      pen.fillStyle = color("link");
      dot(lit.image, lit.text, 6);
    }
    pen.restore();
    this.shown = rows.map((row) => ({ row, x: x(row.image), y: y(row.text) }));
  }

  axes(pen, box, across, up, color) {
    pen.strokeStyle = color("line");
    pen.strokeRect(box.left, box.top, box.right - box.left, box.bottom - box.top);
    pen.fillStyle = color("soft");
    pen.font = "11px system-ui, sans-serif";
    const short = (value) => value.toPrecision(2);
    pen.textAlign = "left";
    pen.fillText(short(across[0]), box.left, box.bottom + 13);
    pen.textAlign = "right";
    pen.fillText(short(across[1]), box.right, box.bottom + 13);
    pen.fillText(short(up[0]), box.left - 4, box.bottom);
    pen.fillText(short(up[1]), box.left - 4, box.top + 9);
    pen.textAlign = "center";
    pen.fillText("image similarity", (box.left + box.right) / 2, box.bottom + 27);
    pen.save();
    pen.translate(12, (box.top + box.bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("text similarity", 0, 0);
    pen.restore();
  }

  nearest(event) {
    const place = this.canvas.getBoundingClientRect();
    let [best, least] = [null, 14];
    for (const one of this.shown) {
      const far = Math.hypot(one.x - event.clientX + place.left, one.y - event.clientY + place.top);
      if (far < least) [best, least] = [one.row, far];
    }
    return best;
  }
}
