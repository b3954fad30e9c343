// Reward against drift: one path a run, one point an evaluation.

function makePlane(parent, choice) {
  const tip = element('div', { className: 'tip', hidden: true, 'aria-live': 'polite' });
  const plot = element('div', { className: 'plot', tabIndex: 0, role: 'img',
    'aria-label': 'Reward against drift, as paths; the left and right arrow keys read their points' });
  const state = { stops: [] };
  readable(plot, tip, state, () => {});
  const draw = () => {
    if (!plot.clientWidth) return;
    const height = Math.min(460, Math.max(300, plot.clientWidth * 0.5));
    plot.replaceChildren(drawPlane(choice.value, plot.clientWidth, height, state), tip);
    tip.hidden = true;
  };
  parent.append(element('figure', { className: 'panel wide' }, plot));
  onWidth(plot, draw);
  return { draw };
}

function planePaths(metric) {
  const across = data.panels.find((panel) => panel.metric === metric);
  const up = data.panels.find((panel) => panel.metric === 'reward');
  return visibleRuns().map((run) => {
    const reward = new Map((up ? up.runs[run].eval : []).map(([update, mean]) => [update, mean]));
    const points = across.runs[run].eval.filter(([update]) => reward.has(update))
      .map(([update, x]) => ({ run, update, x, y: reward.get(update), label: update === 0 ? 'base' : `update ${update}` }));
    const guided = new Map((up ? up.runs[run].guided : []).map(([scale, y]) => [scale, y]));
    const bases = across.runs[run].guided.filter(([scale]) => guided.has(scale))
      .map(([scale, x, label]) => ({ run, update: null, x, y: guided.get(scale), label }));
    return { run, points, bases };
  });
}

function drawPlane(metric, width, height, state) {
  const paths = planePaths(metric);
  const all = paths.flatMap(({ points, bases }) => [...points, ...bases]);
  const root = svg('svg', { width, height, viewBox: `0 0 ${width} ${height}`, 'aria-hidden': 'true' });
  state.stops = [];
  if (!all.length) {
    root.append(svg('text', { class: 'empty', x: width / 2, y: height / 2, 'text-anchor': 'middle' },
      view.shown.size ? 'no evaluation measured both' : 'no run chosen'));
    return root;
  }
  const title = data.panels.find((panel) => panel.metric === metric).title;
  const frame = plotFrame(width, height, padded(all.map(({ x }) => x), 0.08), padded(all.map(({ y }) => y), 0.1), title);
  root.append(frame.drawn, svg('text', { class: 'axis-title', x: MARGIN.left, y: 11 }, '↑ reward on held-out prompts'));
  const labels = [];
  for (const { run, points, bases } of paths) {
    const at = ({ x, y }) => [frame.toX(x), frame.toY(y)];
    root.append(svg('path', { class: `eval ${runClass(run)}`, d: linePath(points.map(at)) }));
    points.forEach((point) => root.append(marker(run, ...at(point), 4.2, point.update === 0 ? 'hollow' : '')));
    for (const base of bases) root.append(svg('path', { class: `mark hollow ${runClass(run)}`, d: 'M0,-8L2,-2L8,0L2,2L0,8L-2,2L-8,0L-2,-2Z',
      transform: `translate(${at(base)})` }));
    const last = points.at(-1);
    if (last && last.update !== 0) labels.push({ text: data.runs.length > 1 ? data.runs[run].name : last.label, at: at(last), run });
    for (const point of [...points.slice(0, 1).filter(({ update }) => update === 0), ...bases]) labels.push({ text: point.label, at: at(point) });
    state.stops.push(...[...bases, ...points].map((point) => ({ x: at(point)[0], y: at(point)[1], lines: () => planeLines(point, title) })));
  }
  root.append(...placeLabels(labels, frame));
  return root;
}

// Each label once, beside its point, on the side where there is room and no other label.
function placeLabels(labels, frame) {
  const taken = [];
  return labels.flatMap(({ text, at: [x, y], run }) => {
    const width = text.length * 6.6;
    const left = x + 12 + width > frame.right;
    for (const shift of run === undefined ? [4, -10, 18, -24, 32] : [-10, 18, -24, 32]) {
      const box = { text, x0: left ? x - 12 - width : x + 12, y: y + shift };
      const clash = taken.find((one) => Math.abs(one.y - box.y) < 13 && one.x0 < box.x0 + width && box.x0 < one.x0 + one.width);
      if (clash && clash.text === text && !run) return [];
      if (clash || box.y > frame.bottom - 2) continue;
      taken.push({ ...box, width });
      return [svg('text', { class: run === undefined ? 'point-label' : `point-label ${runClass(run)}`, x: left ? x - 12 : x + 12,
        y: box.y, 'text-anchor': left ? 'end' : 'start' }, text)];
    }
    return [];
  });
}

function planeLines(point, title) {
  const name = data.runs.length > 1 ? `${data.runs[point.run].name}, ` : '';
  return [element('p', {}, swatch(point.run), ` ${name}${point.label}`),
    element('p', { className: 'value' }, element('b', {}, formatNumber(point.y)), ' reward'),
    element('p', { className: 'value' }, element('b', {}, formatNumber(point.x)), ` ${title}`)];
}
