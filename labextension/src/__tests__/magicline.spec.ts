import { movable, parse, poolOf, sendTo, takeBack, withoutPool } from '../magicline';
import { bundle } from './bundle';

const trans = bundle();
const POOLS = [
  { name: 'desk', kind: 'local' },
  { name: 'hpc', kind: 'slurm' },
  { name: 'gpu', kind: 'slurm' },
  { name: "ann's", kind: 'slurm' },
  { name: 'cloud', kind: 'kubernetes' }
];
const [desk, hpc, gpu, quoted] = POOLS;

describe('parse', () => {
  it('takes the magic off the top', () => {
    expect(parse('%%slurm --cpus 4\nx = 1\n')).toEqual({
      name: 'slurm',
      options: '--cpus 4',
      before: '',
      body: 'x = 1\n'
    });
  });
  it('passes over blank lines and needs no body', () => {
    expect(parse('\n  \n%%local')).toMatchObject({ name: 'local', before: '\n  \n', body: '' });
  });
  it('takes nothing else for a magic', () => {
    for (const source of ['x = 1', '', '# %%slurm\nx', 'x\n%%slurm', ' %%slurm\nx', '%slurm']) {
      expect(parse(source)).toBeNull();
    }
  });
});

describe('poolOf', () => {
  it.each([
    ['x = 1', null],
    ['%%time\nx', null],
    ['%%slurm\nx', 'hpc'],
    ['%%slurm --cpus 2 --pool gpu\nx', 'gpu'],
    ['%%slurm --pool=gpu\nx', 'gpu'],
    ['%%slurm --pool "ann\'s"\nx', "ann's"],
    ['%%pbs\nx', 'pbs'],
    ['%%k8s\nx', 'cloud'],
    ['%%slurm --name "--pool gpu" --array p=["--pool gpu", 1]\nx', 'hpc']
  ])('%j runs on %j', (source, pool) => {
    expect(poolOf(source, POOLS)).toBe(pool);
  });
});

describe('sendTo', () => {
  it('adds the line on top', () => {
    expect(sendTo('x = 1', desk, POOLS, trans)).toBe('%%local\nx = 1');
    expect(sendTo('x = 1', gpu, POOLS, trans)).toBe('%%slurm --pool gpu\nx = 1');
  });
  it('keeps the options, also those of an array', () => {
    const source = '%%slurm --cpus 4 --array lr=[0.1, 0.2]  --out "a, b"\nx';
    expect(sendTo(source, desk, POOLS, trans)).toBe(
      '%%local --cpus 4 --array lr=[0.1, 0.2]  --out "a, b"\nx'
    );
    expect(sendTo(sendTo(source, gpu, POOLS, trans), hpc, POOLS, trans)).toBe(source);
  });
  it('replaces only the option that names the pool', () => {
    const source = '%%slurm --name "--pool here" --pool gpu --array p=["--pool x"] --wait\nx';
    expect(sendTo(source, hpc, POOLS, trans)).toBe(
      '%%slurm --name "--pool here" --array p=["--pool x"] --wait\nx'
    );
  });
  it('is the same when done twice, and leaves the body alone', () => {
    const body = '\n\ndef f():\n    return "%%slurm"\n';
    const once = sendTo(body, gpu, POOLS, trans);
    expect(sendTo(once, gpu, POOLS, trans)).toBe(once);
    expect(takeBack(once).source).toBe(body);
  });
  it('takes options up again that were put away', () => {
    const { source, options } = takeBack('%%slurm --pool gpu --cpus 8\nx');
    expect([source, options]).toEqual(['x', '--cpus 8']);
    expect(sendTo(source, hpc, POOLS, trans, options)).toBe('%%slurm --cpus 8\nx');
  });
  it('quotes a name that is more than one word to a shell', () => {
    expect(sendTo('x', quoted, POOLS, trans)).toBe('%%slurm --pool "ann\'s"\nx');
    expect(poolOf(sendTo('x', quoted, POOLS, trans), POOLS)).toBe("ann's");
    expect(sendTo('x', { name: 'my pool', kind: 'local' }, POOLS, trans)).toBe(
      "%%local --pool 'my pool'\nx"
    );
  });
  it('does not touch a cell with another magic', () => {
    expect(movable('%%bash\nls')).toBe(false);
    expect(() => sendTo('%%bash\nls', hpc, POOLS, trans)).toThrow('%%bash');
    expect(takeBack('%%bash\nls').source).toBe('%%bash\nls');
  });
});

describe('withoutPool', () => {
  it.each([
    ['--pool', ''],
    ['--pool a', ''],
    ['--pool=a --wait', '--wait'],
    ['--wait --pool a', '--wait'],
    ['--cpus 2 --pool "a b" --wait', '--cpus 2 --wait'],
    ["--pool 'unclosed --wait", '']
  ])('%j becomes %j', (before, after) => {
    expect(withoutPool(before)).toBe(after);
  });
});
