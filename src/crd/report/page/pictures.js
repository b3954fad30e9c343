// Sprite sheets, decoded once, and the grid of images with its slider.

const sheets = new Map();
const FIRST_TILES = 24; // until all are asked for, and on paper

// The decoded sheet of a step; its text is turned into a picture when it is first wanted.
function sheetOf(step) {
  if (!sheets.has(step.sheet)) {
    const bytes = Uint8Array.from(atob(document.getElementById(step.sheet).textContent), (one) => one.charCodeAt(0));
    const image = new Image();
    image.src = URL.createObjectURL(new Blob([bytes], { type: step.mime }));
    const entry = { image, ready: false };
    entry.loaded = image.decode().then(() => { entry.ready = true; return entry; });
    sheets.set(step.sheet, entry);
  }
  return sheets.get(step.sheet);
}

// Draws at once if the sheet is decoded. A canvas that has been given another picture meanwhile keeps that.
function drawTile(canvas, step, picture) {
  const key = `${step.sheet} ${picture}`;
  canvas.dataset.key = key;
  const entry = sheetOf(step);
  const paint = () => {
    if (canvas.dataset.key !== key) return;
    canvas.width = step.tile;
    canvas.height = step.tile;
    const [column, row] = [picture % step.columns, Math.floor(picture / step.columns)];
    canvas.getContext('2d').drawImage(entry.image, column * step.tile, row * step.tile, step.tile, step.tile, 0, 0, step.tile, step.tile);
  };
  if (entry.ready) paint();
  else entry.loaded.then(paint);
}

function scoreAt(step, name, picture) {
  const column = step.scores[name];
  return column ? column[picture] : null;
}

function firstStep(grid) {
  return grid.steps.find(({ update }) => update === 0) ?? grid.steps[0];
}

function makeGrid() {
  const byId = (id) => document.getElementById(id);
  const runs = data.grids.map((grid, run) => ({ grid, run })).filter(({ grid }) => grid);
  const tiles = byId('grid');
  const [runPick, beside, score, order, find, slider] = ['run', 'beside', 'score', 'order', 'find', 'step'].map((id) => byId(`grid-${id}`));
  const more = byId('grid-more');
  let grid = runs[0].grid;
  let whole = false;
  const visible = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) visible.add(target); else visible.delete(target);
      if (isIntersecting) show(target); else release(target);
    }
  }, { rootMargin: '400px' });

  const now = () => grid.steps[Number(slider.value)];
  const other = () => (beside.value === '' ? null : grid.steps[Number(beside.value)]);

  function show(tile) {
    const picture = Number(tile.dataset.picture);
    const [first, second] = tile.querySelectorAll('canvas');
    const reference = other();
    first.hidden = !reference;
    if (reference) drawTile(first, reference, picture);
    drawTile(second, now(), picture);
    tile.querySelector('.move').replaceChildren(...moveText(reference, now(), score.value, picture));
  }

  function release(tile) {
    for (const canvas of tile.querySelectorAll('canvas')) {
      canvas.dataset.key = '';
      canvas.width = 0;
    }
  }

  function refresh() {
    byId('grid-label').textContent = now().label;
    slider.setAttribute('aria-valuetext', now().label);
    tiles.classList.toggle('alone', !other());
    for (const tile of visible) show(tile);
  }

  function sorted() {
    const [first, last] = [firstStep(grid), grid.steps.findLast(({ update }) => update) ?? grid.steps.at(-1)];
    const end = (picture) => scoreAt(last, score.value, picture);
    const rise = (picture) => {
      const [a, b] = [scoreAt(first, score.value, picture), end(picture)];
      return a === null || b === null ? null : b - a;
    };
    const key = { given: () => 0, rose: (n) => -rise(n), fell: rise, low: end, high: (n) => -end(n) }[order.value];
    const known = (n) => (order.value === 'given' ? true : ['low', 'high'].includes(order.value) ? end(n) !== null : rise(n) !== null);
    const words = find.value.trim().toLowerCase();
    const all = grid.prompts.map((_, n) => n).filter((n) => grid.prompts[n].toLowerCase().includes(words));
    return [...all.filter(known).sort((a, b) => key(a) - key(b) || a - b), ...all.filter((n) => !known(n))];
  }

  function layOut() {
    watcher.disconnect();
    visible.clear();
    const found = sorted();
    const pictures = whole ? found : found.slice(0, FIRST_TILES);
    more.hidden = pictures.length === found.length;
    more.textContent = `Show all ${found.length} images`;
    tiles.replaceChildren(...pictures.map((picture) => makeTile(grid, picture, () => openViewer(grid, picture, Number(slider.value), score.value))));
    for (const tile of tiles.children) watcher.observe(tile);
    byId('grid-count').textContent = `${found.length === grid.prompts.length ? '' : `${found.length} of `}${grid.prompts.length} images an evaluation`;
    refresh();
  }

  function chooseRun() {
    grid = data.grids[Number(runPick.value)];
    slider.max = grid.steps.length - 1;
    const last = grid.steps.findLastIndex(({ update }) => update);
    slider.value = last < 0 ? grid.steps.length - 1 : last;
    const bases = grid.steps.map((step, n) => ({ step, n })).filter(({ step }) => !step.update);
    beside.replaceChildren(...bases.map(({ step, n }) => new Option(step.label, n)), new Option('nothing', ''));
    score.replaceChildren(...scoreNames(grid).map((name) => new Option(titleOf(name), name)));
    layOut();
  }

  runPick.replaceChildren(...runs.map(({ run }) => new Option(data.runs[run].name, run)));
  byId('grid-run-label').hidden = runs.length < 2;
  runPick.addEventListener('change', chooseRun);
  slider.addEventListener('input', refresh);
  beside.addEventListener('change', refresh);
  for (const control of [score, order]) control.addEventListener('change', layOut);
  find.addEventListener('input', layOut);
  more.addEventListener('click', () => { whole = true; layOut(); });
  window.addEventListener('beforeprint', () => [...tiles.children].slice(0, FIRST_TILES).forEach(show));
  chooseRun();
}

function scoreNames(grid) {
  return [...new Set(grid.steps.flatMap((step) => Object.keys(step.scores)))];
}

function moveText(reference, step, name, picture) {
  const after = scoreAt(step, name, picture);
  if (!reference) return [element('b', {}, formatNumber(after))];
  const before = scoreAt(reference, name, picture);
  const change = before === null || after === null ? 0 : after - before;
  const style = change > 0 ? 'rise' : change < 0 ? 'fall' : '';
  return [`${formatNumber(before)} → `, element('b', { className: style }, formatNumber(after))];
}

function makeTile(grid, picture, open) {
  const prompt = grid.prompts[picture];
  const button = element('button', { type: 'button', className: 'shots', 'aria-label': `Enlarge: ${prompt}` },
    element('canvas', { width: 0 }), element('canvas', { width: 0 }));
  button.addEventListener('click', open);
  const tile = element('figure', { className: 'tile' }, button,
    element('figcaption', {}, element('span', { className: 'move' }), element('span', { className: 'prompt', title: prompt }, prompt)));
  tile.dataset.picture = picture;
  return tile;
}
