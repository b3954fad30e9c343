// Starts the page: what is shown is kept in `view`, and every change of it draws the figures anew.

const data = JSON.parse(document.getElementById('data').textContent);
const view = { axis: 'update', shown: new Set(data.runs.map((_, run) => run)) };
const panels = [];

function startCurves() {
  const [main, more] = [document.getElementById('panels'), document.getElementById('more-panels')];
  if (!main) return () => {};
  for (const panel of data.panels) {
    const made = makePanel(panel, panel.metric === 'reward');
    panels.push(made);
    (panel.more ? more : main).append(made.figure);
  }
  document.getElementById('more-curves').hidden = !more.children.length;
  for (const radio of document.querySelectorAll('input[name=axis]')) {
    radio.addEventListener('change', () => {
      view.axis = radio.value;
      for (const panel of panels) panel.draw();
    });
  }
  return () => panels.forEach((panel) => panel.draw());
}

function startPlane() {
  const choice = document.getElementById('plane-x');
  if (!choice) return () => {};
  choice.replaceChildren(...data.plane.map((metric) => new Option(data.panels.find((panel) => panel.metric === metric).title, metric)));
  const plane = makePlane(document.getElementById('plane-figure'), choice);
  choice.addEventListener('change', plane.draw);
  return plane.draw;
}

function startLegends(redraw) {
  for (const legend of document.querySelectorAll('.legend')) {
    legend.hidden = data.runs.length < 2;
    data.runs.forEach((run, number) => {
      const button = element('button', { type: 'button', 'aria-pressed': 'true' }, swatch(number), run.name);
      button.dataset.run = number;
      button.addEventListener('click', () => {
        if (!view.shown.delete(number)) view.shown.add(number);
        for (const one of document.querySelectorAll(`.legend [data-run="${number}"]`)) one.setAttribute('aria-pressed', view.shown.has(number));
        redraw();
      });
      legend.append(button);
    });
  }
  for (const place of document.querySelectorAll('[data-swatch]')) place.append(swatch(Number(place.dataset.swatch)));
}

function startThumbs() {
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) drawThumb(target);
  }, { rootMargin: '400px' });
  for (const canvas of document.querySelectorAll('canvas[data-moment]')) watcher.observe(canvas);
}

function drawThumb(canvas) {
  const grid = data.grids[Number(canvas.dataset.run)];
  const after = grid.steps.findLast(({ update }) => update) ?? grid.steps.at(-1);
  drawTile(canvas, canvas.dataset.moment === 'before' ? firstStep(grid) : after, Number(canvas.dataset.picture));
}

function startTheme() {
  const button = document.getElementById('theme');
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  const name = () => { button.textContent = dark() ? 'Light' : 'Dark'; };
  button.addEventListener('click', () => { root.dataset.theme = dark() ? 'light' : 'dark'; name(); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', name);
  button.hidden = false;
  name();
}

// Paper has no closed parts: what was closed on the screen is closed again afterwards.
function startPrint(redraw) {
  let opened = [];
  window.addEventListener('beforeprint', () => {
    opened = [...document.querySelectorAll('details:not([open])')];
    for (const part of opened) part.open = true;
    document.querySelectorAll('canvas[data-moment]').forEach(drawThumb);
    redraw();
  });
  window.addEventListener('afterprint', () => {
    for (const part of opened) part.open = false;
    redraw();
  });
}

function start() {
  for (const part of document.querySelectorAll('.needs-script')) part.hidden = false;
  startTheme();
  const draws = [startCurves(), startPlane()];
  const redraw = () => draws.forEach((draw) => draw());
  startLegends(redraw);
  if (data.grids.some(Boolean)) {
    makeGrid();
    startThumbs();
    startViewer();
  }
  startPrint(redraw);
}

start();
