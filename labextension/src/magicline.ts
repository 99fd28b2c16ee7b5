/** The magic line on top of a cell: which pool it names, and how it is written for another. Pure text. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { IPool } from './types';

/** The magic of each kind of pool; other kinds have none yet. */
const MAGICS: Record<string, string> = {
  local: 'local',
  slurm: 'slurm',
  pbs: 'pbs',
  htcondor: 'htcondor',
  kubernetes: 'k8s'
};
const KINDS = new Map(Object.entries(MAGICS).map(([kind, magic]) => [magic, kind]));

type Place = Pick<IPool, 'name' | 'kind'>;

export interface ICellMagic {
  /** `slurm` of `%%slurm --cpus 4`. */
  name: string;
  /** What follows the name, as it is written. */
  options: string;
  /** Blank lines above it. */
  before: string;
  /** The rest of the cell. */
  body: string;
}

/** Take the magic off the top of a cell; null where it has none. */
export function parse(source: string): ICellMagic | null {
  const found = /^((?:[ \t]*\n)*)%%(\w+)([^\n]*)(?:\n|$)/.exec(source);
  if (!found) {
    return null;
  }
  const [all, before, name, options] = found;
  return { name, options: options.trim(), before, body: source.slice(all.length) };
}

/** Whether a cell can be sent to a pool: it has no magic, or one of ours. */
export function movable(source: string): boolean {
  const magic = parse(source);
  return magic === null || KINDS.has(magic.name);
}

interface IWord {
  text: string;
  start: number;
  end: number;
}

/** Split options as the magic does: quotes as in a shell; brackets keep the value of `--array` together. */
function words(options: string): IWord[] {
  const found: IWord[] = [];
  let position = 0;
  while (position < options.length) {
    if (/\s/.test(options[position])) {
      position += 1;
      continue;
    }
    const start = position;
    const python =
      found[found.length - 1]?.text === '--array' || options.startsWith('--array=', start);
    let quote = '';
    let depth = 0;
    for (; position < options.length; position++) {
      const character = options[position];
      if (!quote && depth <= 0 && /\s/.test(character)) {
        break;
      }
      if (character === '\\' && quote !== "'") {
        position += 1;
      } else if (quote) {
        quote = character === quote ? '' : quote;
      } else if (character === '"' || character === "'") {
        quote = character;
      } else if (python && '([{'.includes(character)) {
        depth += 1;
      } else if (python && ')]}'.includes(character)) {
        depth -= 1;
      }
    }
    const end = Math.min(position, options.length);
    found.push({ text: options.slice(start, end), start, end });
  }
  return found;
}

/** Where `--pool` and its value stand in the options, and the value. */
function poolOption(options: string): { start: number; end: number; name: string } | null {
  const all = words(options);
  for (const [index, word] of all.entries()) {
    if (word.text.startsWith('--pool=')) {
      return { start: word.start, end: word.end, name: unquoted(word.text.slice(7)) };
    }
    if (word.text === '--pool') {
      const value = all[index + 1];
      return { start: word.start, end: (value ?? word).end, name: unquoted(value?.text ?? '') };
    }
  }
  return null;
}

function unquoted(word: string): string {
  const quoted = /^(["'])(.*)\1$/.exec(word);
  return quoted ? quoted[2] : word.replace(/["'\\]/g, '');
}

/** Return the name of the pool that a cell runs on; null for the notebook's own kernel. */
export function poolOf(source: string, pools: readonly Place[]): string | null {
  const magic = parse(source);
  const kind = magic && KINDS.get(magic.name);
  if (!magic || !kind) {
    return null;
  }
  // Without `--pool` the magic takes the first pool of its kind; one that is not configured is still named.
  return (
    poolOption(magic.options)?.name || (pools.find(pool => pool.kind === kind)?.name ?? magic.name)
  );
}

/** Return the options without `--pool`; all else stays as it is written. */
export function withoutPool(options: string): string {
  const found = poolOption(options);
  if (!found) {
    return options;
  }
  return [options.slice(0, found.start).trimEnd(), options.slice(found.end).trimStart()]
    .filter(Boolean)
    .join(' ');
}

/** Return a cell's source for a pool. `options` are those of an earlier magic line, used where the cell has none. */
export function sendTo(
  source: string,
  pool: Place,
  pools: readonly Place[],
  trans: TranslationBundle,
  options = ''
): string {
  const magic = parse(source);
  if (magic && !KINDS.has(magic.name)) {
    throw new Error(trans.__('The cell has a magic of its own: %1', `%%${magic.name}`));
  }
  const name = MAGICS[pool.kind];
  if (name === undefined) {
    throw new Error(trans.__('Pools of kind %1 have no cell magic.', pool.kind));
  }
  const first = pools.find(each => each.kind === pool.kind)?.name === pool.name;
  const quote = pool.name.includes("'") ? '"' : "'";
  const quoted = /^[\w.-]+$/.test(pool.name) ? pool.name : quote + pool.name + quote;
  const line = [
    `%%${name}`,
    first ? '' : `--pool ${quoted}`,
    withoutPool(magic?.options ?? options)
  ]
    .filter(Boolean)
    .join(' ');
  return `${magic?.before ?? ''}${line}\n${magic?.body ?? source}`;
}

/** Return a cell's source for the notebook's own kernel, and the options that its magic line had. */
export function takeBack(source: string): { source: string; options: string } {
  const magic = parse(source);
  if (!magic || !KINDS.has(magic.name)) {
    return { source, options: '' };
  }
  return { source: magic.before + magic.body, options: withoutPool(magic.options) };
}
