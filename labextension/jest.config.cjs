/** The model and the texts are plain TypeScript: they are tested in node, without Lab. */
const esModules = ['@jupyterlab', '@jupyter', 'lib0', 'yjs', 'y-protocols'].join('|');

module.exports = {
  testEnvironment: 'node',
  // A poll of Lumino keeps its timer when it is disposed of.
  forceExit: true,
  testTimeout: 30000,
  testMatch: ['<rootDir>/src/**/__tests__/*.spec.ts'],
  transform: { '^.+\\.tsx?$': ['ts-jest', { tsconfig: 'tsconfig.test.json' }] },
  transformIgnorePatterns: [`/node_modules/(?!(${esModules})/)`]
};
