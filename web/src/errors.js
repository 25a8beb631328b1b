// Errors. Each says what failed, why, and what to do next, as in the Python package.

const MAX_SENTENCE = 8000; // characters; a sentence may quote an untrusted file

/** The base class of all errors of this library. */
export class DeltaMemError extends Error {
  /**
   * @param {string} what failed
   * @param {string} why
   * @param {string} next what to do
   */
  constructor(what, why = "", next = "") {
    [what, why, next] = [what, why, next].map((sentence) => sentence.slice(0, MAX_SENTENCE));
    super([what, why, next].filter(Boolean).join("\n"));
    this.name = new.target.name;
    Object.assign(this, { what, why, next });
  }
}

/** An option is invalid. */
export class ConfigError extends DeltaMemError {}
/** Messages cannot be read, or a chat template leaves out some of them. */
export class DataError extends DeltaMemError {}
/** A model folder is damaged, or this library cannot run it. */
export class ExportError extends DeltaMemError {}
/** A memory is damaged, or does not fit the model. */
export class MemoryStateError extends DeltaMemError {}
/** A file cannot be fetched. */
export class FetchError extends DeltaMemError {}
/** Another tab or window has changed the stored memory. */
export class MemoryConflict extends DeltaMemError {}

/** Return the first line of another library's error message. */
export const firstLine = (error) => String(error?.message ?? error).split("\n")[0].slice(0, 500);
