/** A field of squares on a canvas, one for each task: where each stands, and how it is drawn. */

/** The letters in the order in which they are drawn: what went wrong comes last, on top of the others. */
const DRAWN = 'wrdclf';

/** Pixels that the field may be high before its squares shrink. */
const HEIGHT = 240;
const LARGEST = 16;
/** A square below this is not told from its neighbours; the field grows and scrolls instead. */
const SMALLEST = 4;

/** The variables of the theme, with what stands in where a theme lacks one. */
export const COLOURS: Record<string, [string, string]> = {
  w: ['--jp-border-color2', '#bdbdbd'],
  r: ['--jp-brand-color1', '#1976d2'],
  d: ['--jp-success-color1', '#388e3c'],
  f: ['--jp-error-color1', '#d32f2f'],
  l: ['--jp-warn-color1', '#f57c00'],
  c: ['--jp-ui-font-color3', '#757575']
};

export interface ILayout {
  /** Pixels from one square to the next. */
  cell: number;
  columns: number;
  rows: number;
}

/** Choose squares as large as fit, but none so small that it cannot be told from its neighbours. */
export function layOut(count: number, width: number): ILayout {
  let cell = LARGEST;
  while (
    cell > SMALLEST &&
    Math.ceil(count / Math.max(1, Math.floor(width / cell))) * cell > HEIGHT
  ) {
    cell -= 1;
  }
  const columns = Math.max(1, Math.floor(width / cell));
  return { cell, columns, rows: Math.ceil(count / columns) };
}

/** Draw a mark into a square, so that the state is told without its colour where there is room. */
function mark(
  context: CanvasRenderingContext2D,
  letter: string,
  x: number,
  y: number,
  size: number
): void {
  const inset = size * 0.28;
  context.beginPath();
  if (letter === 'f' || letter === 'l') {
    context.moveTo(x + inset, y + inset);
    context.lineTo(x + size - inset, y + size - inset);
    context.moveTo(x + size - inset, y + inset);
    context.lineTo(x + inset, y + size - inset);
  } else if (letter === 'd') {
    context.moveTo(x + inset, y + size * 0.55);
    context.lineTo(x + size * 0.45, y + size - inset);
    context.lineTo(x + size - inset, y + inset);
  } else if (letter === 'r') {
    context.moveTo(x + inset * 1.3, y + inset);
    context.lineTo(x + size - inset, y + size / 2);
    context.lineTo(x + inset * 1.3, y + size - inset);
    context.closePath();
  } else if (letter === 'c') {
    context.moveTo(x + inset, y + size - inset);
    context.lineTo(x + size - inset, y + inset);
  }
  context.stroke();
}

/** Draw all tasks. `shown` is a letter that is pointed out, `chosen` the task that is looked at. */
export function draw(
  canvas: HTMLCanvasElement,
  states: string,
  layout: ILayout,
  shown: string,
  chosen: number | null
): void {
  const { cell, columns, rows } = layout;
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [columns * cell, rows * cell];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext('2d');
  if (!context) {
    return;
  }
  context.scale(ratio, ratio);
  const style = getComputedStyle(canvas);
  const size = cell - (cell >= 4 ? 1 : 0);
  const background = style.getPropertyValue('--jp-layout-color1').trim() || '#fff';
  context.lineWidth = Math.max(1, size / 9);
  context.strokeStyle = background;
  // Where failed ones are few among squares of few pixels, they are larger than their places.
  const rare = size < 8 && (states.match(/[fl]/g)?.length ?? 0) < states.length / 20;
  // One colour after the other: changing the colour for each of many squares is what would take time.
  for (const letter of DRAWN) {
    const [variable, otherwise] = COLOURS[letter];
    context.fillStyle = style.getPropertyValue(variable).trim() || otherwise;
    context.globalAlpha = shown && shown !== letter ? 0.18 : 1;
    for (
      let index = states.indexOf(letter);
      index >= 0;
      index = states.indexOf(letter, index + 1)
    ) {
      const x = (index % columns) * cell;
      const y = Math.floor(index / columns) * cell;
      const more = rare && (letter === 'f' || letter === 'l') ? 1.5 : 0;
      context.fillRect(x - more, y - more, size + 2 * more, size + 2 * more);
      if (size >= 8) {
        mark(context, letter, x, y, size);
      }
    }
  }
  context.globalAlpha = 1;
  if (chosen !== null && chosen < states.length) {
    const x = (chosen % columns) * cell;
    const y = Math.floor(chosen / columns) * cell;
    context.strokeStyle = style.getPropertyValue('--jp-ui-font-color0').trim() || '#000';
    context.lineWidth = 2;
    context.strokeRect(x - 1, y - 1, size + 2, size + 2);
  }
}
