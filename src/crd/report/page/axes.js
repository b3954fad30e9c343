// Scales, ticks and marks that curves and the plane share.

const MARGIN = { top: 18, right: 14, bottom: 24, left: 50 };

function niceStep(span, wanted) {
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const lead = rough / power;
  return power * (lead < 1.5 ? 1 : lead < 3.5 ? 2 : lead < 7.5 ? 5 : 10);
}

function ticksOf(low, high, wanted) {
  const step = niceStep(high - low, wanted);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) {
    const value = n * step;
    const text = step < 1e-4 ? value.toExponential(0) : grouped(Math.abs(value), digits);
    ticks.push({ value, text: value < -step / 2 ? MINUS + text : text });
  }
  return ticks;
}

// A little air around the data; equal values get a range too.
function padded(values, share) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const pad = (high - low) * share || Math.abs(high) * 0.1 || 1;
  return [low - pad, high + pad];
}

function plotFrame(width, height, x, y, xTitle) {
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const toX = (value) => MARGIN.left + ((value - x[0]) / (x[1] - x[0])) * (right - MARGIN.left);
  const toY = (value) => bottom - ((value - y[0]) / (y[1] - y[0])) * (bottom - MARGIN.top);
  const drawn = svg('g', { class: 'frame' });
  for (const tick of ticksOf(y[0], y[1], height > 250 ? 5 : 4)) {
    const at = toY(tick.value);
    drawn.append(svg('line', { x1: MARGIN.left, x2: right, y1: at, y2: at }),
      svg('text', { x: MARGIN.left - 7, y: at + 3.5, 'text-anchor': 'end' }, tick.text));
  }
  // The axis title stands at the right end of the tick labels; ticks under it stay without a label.
  const titleStart = right - xTitle.length * 6.2 - 22;
  for (const tick of ticksOf(x[0], x[1], Math.max(2, Math.floor(width / 90)))) {
    const at = toX(tick.value);
    drawn.append(svg('line', { class: 'tick', x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    if (at < titleStart) drawn.append(svg('text', { x: at, y: bottom + 17, 'text-anchor': 'middle' }, tick.text));
  }
  drawn.append(svg('line', { class: 'axis', x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
    svg('text', { class: 'axis-title', x: right, y: bottom + 17, 'text-anchor': 'end' }, `${xTitle} →`));
  return { drawn, toX, toY, right, bottom };
}

// Shapes tell runs apart where colors do not.
const SHAPES = [
  (s) => `M${-s},0A${s},${s} 0 1 1 ${s},0A${s},${s} 0 1 1 ${-s},0Z`,
  (s) => `M${-s},${-s}H${s}V${s}H${-s}Z`,
  (s) => `M0,${-1.2 * s}L${1.15 * s},${0.9 * s}H${-1.15 * s}Z`,
  (s) => `M0,${-1.35 * s}L${1.35 * s},0L0,${1.35 * s}L${-1.35 * s},0Z`,
  (s) => `M0,${1.2 * s}L${1.15 * s},${-0.9 * s}H${-1.15 * s}Z`,
];

function marker(run, x, y, size, style = '') {
  const path = SHAPES[run % SHAPES.length](size);
  return svg('path', { class: `mark ${runClass(run)} ${style}`, d: path, transform: `translate(${x},${y})` });
}

function runClass(run) {
  return `run-${run % 8}`;
}

function linePath(points) {
  return points.map(([x, y], n) => `${n ? 'L' : 'M'}${x.toFixed(1)},${y.toFixed(1)}`).join('');
}

function swatch(run) {
  return svg('svg', { class: `swatch-line ${runClass(run)}`, viewBox: '0 0 26 12', width: 26, height: 12, 'aria-hidden': 'true' },
    svg('line', { class: 'eval', x1: 1, x2: 25, y1: 6, y2: 6 }), marker(run, 13, 6, 3.6));
}

// Draws anew when the width of `plot` has changed, after the observer is done: drawing changes the height it observes.
function onWidth(plot, draw) {
  let width = 0;
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (plot.clientWidth === width) return;
    width = plot.clientWidth;
    draw();
  })).observe(plot);
}

// A figure whose points can be read with a pointer or with the arrow keys. `stops` are [{x, y, fill(tip)}] in pixels.
function readable(plot, tip, state, onStop) {
  let current = -1;
  const show = (index) => {
    current = index;
    const stop = state.stops[index];
    tip.hidden = !stop;
    if (stop) {
      tip.replaceChildren(...stop.lines());
      const left = stop.x > plot.clientWidth / 2 ? stop.x - tip.offsetWidth - 12 : stop.x + 12;
      tip.style.left = `${Math.max(0, Math.min(left, plot.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${stop.y === undefined ? 20 : Math.max(0, stop.y - tip.offsetHeight - 10)}px`;
    }
    onStop(stop);
  };
  plot.addEventListener('pointermove', (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest(state.stops, event.clientX - box.left, event.clientY - box.top));
  });
  plot.addEventListener('pointerleave', () => show(-1));
  plot.addEventListener('blur', () => show(-1));
  plot.addEventListener('keydown', (event) => {
    const last = state.stops.length - 1;
    const moves = { ArrowLeft: Math.max(0, current - 1), ArrowRight: Math.min(last, current + 1), Home: 0, End: last, Escape: -1 };
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
}

function nearest(stops, x, y) {
  let best = -1;
  let least = Infinity;
  stops.forEach((stop, index) => {
    const distance = Math.hypot(stop.x - x, stop.y === undefined ? 0 : stop.y - y);
    if (distance < least) [best, least] = [index, distance];
  });
  return best;
}
