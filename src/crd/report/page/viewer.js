// One image over a run's evaluations, enlarged.

let turnViewer = () => {};

function openViewer(grid, picture, start, score) {
  const byId = (id) => document.getElementById(id);
  const dialog = byId('viewer');
  byId('viewer-prompt').textContent = grid.prompts[picture];
  const stage = element('canvas', { role: 'img', 'aria-label': grid.prompts[picture] });
  byId('viewer-stage').replaceChildren(stage);
  const frames = grid.steps.map((step, n) => {
    const canvas = element('canvas', {});
    drawTile(canvas, step, picture);
    const button = element('button', { type: 'button' }, canvas, element('small', {}, step.label),
      element('b', {}, formatNumber(scoreAt(step, score, picture))));
    button.addEventListener('click', () => turn(n));
    return button;
  });
  byId('viewer-strip').replaceChildren(...frames);
  byId('viewer-scores').replaceChildren(...scoreTable(grid, picture));
  let current = start;
  function turn(n) {
    current = Math.max(0, Math.min(grid.steps.length - 1, n));
    drawTile(stage, grid.steps[current], picture);
    byId('viewer-label').textContent = `${grid.steps[current].label}: ${titleOf(score)} ${formatNumber(scoreAt(grid.steps[current], score, picture))}`;
    frames.forEach((frame, one) => frame.setAttribute('aria-pressed', String(one === current)));
    frames[current].scrollIntoView({ block: 'nearest', inline: 'nearest' });
    byId('viewer-scores').rows[0].cells[current + 1].scrollIntoView({ block: 'nearest', inline: 'nearest' });
    for (const row of byId('viewer-scores').rows) [...row.cells].forEach((cell, one) => cell.classList.toggle('now', one === current + 1));
  }
  turnViewer = (by) => turn(current + by);
  dialog.showModal();
  turn(start);
}

function scoreTable(grid, picture) {
  const head = element('tr', {}, element('td'), ...grid.steps.map((step) => element('th', { scope: 'col' }, step.label)));
  const rows = scoreNames(grid).map((name) => element('tr', {}, element('th', { scope: 'row' }, titleOf(name)),
    ...grid.steps.map((step) => element('td', {}, formatNumber(scoreAt(step, name, picture))))));
  return [element('thead', {}, head), element('tbody', {}, ...rows)];
}

function startViewer() {
  const dialog = document.getElementById('viewer');
  dialog.addEventListener('click', (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener('keydown', (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !event.target.closest('.scroll')) {
      event.preventDefault();
      turnViewer(by);
    }
  });
}
