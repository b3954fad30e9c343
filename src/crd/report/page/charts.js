// Curves against updates, images or time.

const AXIS_TITLES = { update: 'updates', images: 'images' };

function axisUnit() {
  if (view.axis !== 'seconds') return { size: 1, title: AXIS_TITLES[view.axis] };
  const longest = Math.max(...data.runs.flatMap((run) => run.axes.seconds));
  if (longest > 7200) return { size: 3600, title: 'hours' };
  return longest > 120 ? { size: 60, title: 'minutes' } : { size: 1, title: 'seconds' };
}

// Where an update lies on the chosen axis; null = not recorded.
function placeOf(run, update) {
  if (view.axis === 'update') return update;
  const axes = data.runs[run].axes;
  const index = axes.update.findLastIndex((one) => one <= update);
  const value = index < 0 ? null : axes[view.axis][index];
  return value === null ? null : value / axisUnit().size;
}

function visibleRuns() {
  return data.runs.map((_, run) => run).filter((run) => view.shown.has(run));
}

function makePanel(panel, wide) {
  const tip = element('div', { className: 'tip', hidden: true, 'aria-live': 'polite' });
  const plot = element('div', { className: 'plot', tabIndex: 0, role: 'img',
    'aria-label': `${panel.title}, as curves; the left and right arrow keys read their points` });
  const caption = element('figcaption', {}, element('b', {}, panel.title), ' ', element('small', {}, panel.hint));
  const figure = element('figure', { className: wide ? 'panel wide' : 'panel' }, caption, plot);
  const state = { stops: [], cursor: null, toX: null };
  readable(plot, tip, state, (stop) => {
    for (const one of panels) one.point(stop ? stop.value : null);
  });
  const point = (value) => {
    if (!state.cursor) return;
    state.cursor.setAttribute('visibility', value === null ? 'hidden' : 'visible');
    if (value !== null) state.cursor.setAttribute('transform', `translate(${state.toX(value)},0)`);
  };
  const draw = () => {
    if (!plot.clientWidth) return;
    plot.replaceChildren(drawCurves(panel, plot.clientWidth, wide ? 290 : 190, state), tip);
    tip.hidden = true;
  };
  onWidth(plot, draw);
  return { figure, draw, point };
}

function curvesOf(panel) {
  return visibleRuns().map((run) => {
    const lines = panel.runs[run];
    const placed = (points) => points.map(([update, ...rest]) => [placeOf(run, update), ...rest])
      .filter(([x, y]) => x !== null && y !== null);
    return { run, lines, train: placed(lines.train), held: placed(lines.eval) };
  });
}

function drawCurves(panel, width, height, state) {
  const curves = curvesOf(panel);
  const values = curves.flatMap(({ lines, train, held }) => [
    ...train.map(([, y]) => y), ...held.flatMap(([, ...ys]) => ys), lines.base, ...lines.guided.map(([, y]) => y),
    ...(lines.band ?? [])]).filter((value) => value !== null);
  const places = visibleRuns().flatMap((run) => [0, placeOf(run, data.runs[run].axes.update.at(-1))])
    .concat(curves.flatMap(({ held }) => held.map(([x]) => x))).filter((value) => value !== null);
  const root = svg('svg', { width, height, viewBox: `0 0 ${width} ${height}`, 'aria-hidden': 'true' });
  state.stops = [];
  if (!values.length || !places.length) {
    root.append(svg('text', { class: 'empty', x: width / 2, y: height / 2, 'text-anchor': 'middle' }, 'not measured'));
    state.cursor = null;
    return root;
  }
  const frame = plotFrame(width, height, [0, Math.max(...places) || 1], padded(values, 0.07), axisUnit().title);
  state.toX = frame.toX;
  state.cursor = svg('line', { class: 'cursor', y1: MARGIN.top, y2: frame.bottom, visibility: 'hidden' });
  const bases = baseLines(curves, frame);
  root.append(...shadedBands(curves, frame), frame.drawn, ...alarmMarks(frame), ...bases.lines);
  for (const { run, train, held } of curves) root.append(...curveMarks(run, train, held, frame));
  root.append(...bases.labels, state.cursor);
  state.stops = curveStops(curves, frame, panel);
  return root;
}

function shadedBands(curves, frame) {
  const bands = unique(curves.filter(({ lines }) => lines.band).map(({ lines }) => ({ value: lines.band })));
  return bands.map(({ value: [low, high] }) => svg('rect', { class: 'band', x: MARGIN.left, y: frame.toY(high),
    width: frame.right - MARGIN.left, height: frame.toY(low) - frame.toY(high) }));
}

// Equal base values of several runs are one line.
function baseLines(curves, frame) {
  const found = unique(curves.flatMap(({ lines }) => [
    ...(lines.base === null ? [] : [{ label: 'base', value: lines.base }]),
    ...lines.guided.map(([, value, label]) => ({ label, value }))]));
  found.sort((a, b) => b.value - a.value);
  const labels = [];
  const lines = found.map(({ label, value }) => {
    const y = frame.toY(value);
    // Above its line, or below where another label is in the way; lines of one name next to each other share a label.
    const clash = labels.find((one) => Math.abs(one.y - (y - 4)) < 12);
    if (clash?.label !== label) labels.push({ label, y: clash ? Math.max(y + 11, clash.y + 12) : y - 4 });
    return svg('line', { class: label === 'base' ? 'base' : 'base guided', x1: MARGIN.left, x2: frame.right, y1: y, y2: y });
  });
  return { lines, labels: labels.map(({ label, y }) => svg('text', { class: 'base-label', x: frame.right, y, 'text-anchor': 'end' }, label)) };
}

function unique(items) {
  const seen = new Map(items.map((item) => [JSON.stringify(item), item]));
  return [...seen.values()];
}

function alarmMarks(frame) {
  return visibleRuns().flatMap((run) => data.runs[run].events.filter((event) => event.kind !== 'note').flatMap((event) => {
    const place = placeOf(run, event.update);
    if (place === null) return [];
    const x = frame.toX(place);
    const shape = { warn: 'M0,-6L6,5H-6Z', raise_kl: 'M0,-6L5,0H2V6H-2V0H-5Z', stop: 'M-5,-5H5V5H-5Z' }[event.kind];
    return [svg('line', { class: 'alarm-line', x1: x, x2: x, y1: MARGIN.top - 4, y2: frame.bottom }),
      svg('path', { class: 'alarm-mark', d: shape, transform: `translate(${x},${MARGIN.top - 10})` },
        svg('title', {}, `update ${event.update}, ${event.rule}: ${event.message}`))];
  }));
}

function curveMarks(run, train, held, frame) {
  const at = ([x, y]) => [frame.toX(x), frame.toY(y)];
  const marks = [];
  const wide = held.filter(([, , low, high]) => low !== null && high !== null);
  if (wide.length > 1) {
    const edge = [...wide.map(([x, , low]) => at([x, low])), ...wide.map(([x, , , high]) => at([x, high])).reverse()];
    marks.push(svg('path', { class: `interval ${runClass(run)}`, d: `${linePath(edge)}Z` }));
  }
  if (train.length) marks.push(svg('path', { class: `train ${runClass(run)}`, d: linePath(train.map(at)) }));
  if (held.length) marks.push(svg('path', { class: `eval ${runClass(run)}`, d: linePath(held.map(at)) }));
  for (const point of held) marks.push(marker(run, ...at(point), held.length > 30 ? 2.2 : 3.4));
  return marks;
}

function curveStops(curves, frame, panel) {
  const stops = new Map();
  const stopAt = (value) => {
    if (!stops.has(value)) stops.set(value, { value, x: frame.toX(value), rows: new Map(), alarms: [] });
    return stops.get(value);
  };
  const rowOf = (value, run) => {
    const rows = stopAt(value).rows;
    if (!rows.has(run)) rows.set(run, {});
    return rows.get(run);
  };
  for (const { run, lines, train, held } of curves) {
    for (const [x, y] of train) rowOf(x, run).train = y;
    for (const [x, ...three] of held) rowOf(x, run).held = three;
    for (const [update] of [...lines.train, ...lines.eval]) {
      const place = placeOf(run, update);
      if (place !== null && stops.has(place)) rowOf(place, run).update = update;
    }
    for (const event of data.runs[run].events) {
      const place = placeOf(run, event.update);
      if (place !== null && event.kind !== 'note') stopAt(place).alarms.push(event);
    }
  }
  const sorted = [...stops.values()].sort((a, b) => a.value - b.value);
  for (const stop of sorted) stop.lines = () => stopLines(stop, panel);
  return sorted;
}

function stopLines(stop, panel) {
  const lines = [];
  for (const [run, row] of stop.rows) {
    const name = data.runs.length > 1 ? `${data.runs[run].name}, ` : '';
    lines.push(element('p', {}, swatch(run), ` ${name}${row.update === 0 ? 'base' : `update ${row.update}`}`));
    if (row.held) {
      const [mean, low, high] = row.held;
      const interval = low === null ? '' : ` [${formatNumber(low)}, ${formatNumber(high)}]`;
      lines.push(element('p', { className: 'value' }, element('b', {}, formatNumber(mean)), `${interval} held-out prompts`));
    }
    if (row.train !== undefined) {
      const word = panel.runs[run].eval.length ? ' training prompts' : '';
      lines.push(element('p', { className: 'value' }, element('b', {}, formatNumber(row.train)), word));
    }
  }
  for (const event of stop.alarms) lines.push(element('p', { className: 'alarm-text' }, `${event.rule}: ${event.message}`));
  return lines;
}
