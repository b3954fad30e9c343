// Numbers as words.py writes them, and elements without innerHTML: text of a run is never markup.

const MINUS = '\u2212';

function formatNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  const size = Math.abs(value);
  let text;
  if (size === 0) text = '0';
  else if (size < 1e-4) text = size.toExponential(1);
  else if (size < 0.01) text = String(Number(size.toPrecision(2)));
  else text = grouped(size, Number.isInteger(value) ? 0 : size < 10 ? 3 : size < 100 ? 2 : size < 1000 ? 1 : 0);
  return value < 0 ? MINUS + text : text;
}

function formatSigned(value) {
  return value > 0 ? `+${formatNumber(value)}` : formatNumber(value);
}

function grouped(value, digits) {
  return value.toLocaleString('en-US', { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function titleOf(metric) {
  for (const [prefix, word] of [['reward_', 'Reward: '], ['held_out_', 'Held out: ']]) {
    if (metric.startsWith(prefix)) return word + metric.slice(prefix.length).replaceAll('_', ' ');
  }
  return metric === 'reward' ? 'Reward' : metric.replaceAll('_', ' ');
}

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes('-') || key === 'role') made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

const SVG = document.getElementById('svg-root').namespaceURI;

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
