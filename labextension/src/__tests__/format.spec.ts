import { bytes, duration, elapsed, money, percent } from '../format';
import { plain } from '../logmodel';
import { memoryText, timeText } from '../resources';
import { layOut } from '../grid';
import { causeWord, resourceWord } from '../words';
import { bundle } from './bundle';

const trans = bundle();

it.each([
  [0.4, '0 s'],
  [59.6, '1 min'],
  [60, '1 min'],
  [61, '1 min 1 s'],
  [3600, '1 h'],
  [3660, '1 h 1 min'],
  [90000, '1 d 1 h']
])('%f seconds are %s', (seconds, said) => expect(duration(seconds, trans)).toBe(said));

it.each([
  [0, '0 B'],
  [1023, '1023 B'],
  [1024, '1 kB'],
  [1536, '1.5 kB'],
  [2 ** 33, '8 GB'],
  [2 ** 60, '1024 PB']
])('%d bytes are %s', (size, said) => expect(bytes(size, trans)).toBe(said));

it('says units, causes and resources in the language of the user', () => {
  const german = bundle({
    '%1 d': '%1 T',
    '%1 h': '%1 Std.',
    '%1 %': '%1 v. H.',
    '%1 GB': '%1 GByte',
    'Out of memory': 'Kein Speicher mehr',
    'Tasks per node': 'Prozesse je Knoten'
  });
  expect(duration(90000, german)).toBe('1 T 1 Std.');
  expect(bytes(2 ** 33, german)).toBe('8 GByte');
  expect(percent(0.5, german)).toBe('50 v. H.');
  expect(causeWord('OUT_OF_MEMORY', german)).toBe('Kein Speicher mehr');
  expect(resourceWord('tasks_per_node', german)).toBe('Prozesse je Knoten');
});

it('shows a cause that it does not know as it is', () => {
  expect(causeWord('USER_ERROR', trans)).toBe('Error in the code');
  expect(causeWord('SOLAR_FLARE', trans)).toBe('SOLAR_FLARE');
});

it('tells small costs from nothing', () => {
  expect([0, 0.001, 1.234].map(money)).toEqual(['0.00', '< 0.01', '1.23']);
});

it('counts from the start to the end, or to now', () => {
  expect(elapsed({ started: null, ended: null }, 10)).toBeNull();
  expect(elapsed({ started: 4, ended: null }, 10)).toBe(6);
  expect(elapsed({ started: 4, ended: 5 }, 10)).toBe(1);
});

it('shows of a log what a terminal would have', () => {
  expect(plain('a\x1b[31mred\x1b[0m b')).toBe('ared b');
  expect(plain(' 10%\r 50%\r100%\ndone\r\n')).toBe('100%\ndone\n');
  expect(plain('50%\r')).toBe('50%');
});

it('writes resources as the magics take them', () => {
  expect([2 ** 33, 200 * 2 ** 20, 1].map(memoryText)).toEqual(['8G', '200M', '1M']);
  expect([3600, 5400, 61].map(timeText)).toEqual(['1h', '90min', '2min']);
});

it.each([
  [10, 280],
  [300, 230],
  [1000, 280],
  [10_000, 280],
  [10_000, 800],
  [1, 5]
])('%d tasks have their places in %d pixels', (count, width) => {
  const { cell, columns, rows } = layOut(count, width);
  expect(columns * rows).toBeGreaterThanOrEqual(count);
  expect(columns * (rows - 1)).toBeLessThan(count);
  expect(cell).toBeGreaterThanOrEqual(4);
  expect(cell).toBeLessThanOrEqual(16);
  if (columns > 1) {
    expect(columns * cell).toBeLessThanOrEqual(width);
  }
});
