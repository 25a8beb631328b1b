// Chooses the next token from logits, as in deltamem_tool/chat/sampling.py.

import { ConfigError, DeltaMemError } from "./errors.js";
import { Random } from "./random.js";

/**
 * How tokens are chosen and when the answer ends. The options apply in the order of transformers' `generate`: repetition
 * penalty, temperature, top-k, top-p, min-p.
 *
 * @typedef {object} Sampling
 * @property {number} maxNewTokens maximum number of tokens in the answer
 * @property {number} temperature 0 picks the most likely token; higher values vary the answer more
 * @property {number} topK sample among this many most likely tokens; 0 for all
 * @property {number} topP sample among the most likely tokens whose probabilities add up to this
 * @property {number} minP sample among tokens with at least this fraction of the most likely token's probability
 * @property {number} repetitionPenalty penalty for tokens that are already in the context; 1 changes nothing
 * @property {number | null} seed random seed for sampling; null draws a new one
 * @property {string[]} stop stop strings; the answer ends before the first one
 */
const DEFAULTS = {
  maxNewTokens: 256,
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  seed: null,
  stop: [],
};

/**
 * Return complete sampling options, with the default of each option that is left out.
 *
 * @param {Partial<Sampling>} options
 * @returns {Sampling}
 * @throws {ConfigError} an option is unknown or out of range
 */
export function createSampling(options) {
  const sampling = { ...DEFAULTS, ...options };
  const { maxNewTokens, temperature, topK, topP, minP, repetitionPenalty, seed, stop } = sampling;
  for (const [isValid, why] of [
    [Object.keys(options).every((name) => name in DEFAULTS), `the options are ${Object.keys(DEFAULTS).join(", ")}`],
    [Number.isInteger(maxNewTokens) && maxNewTokens >= 1, `maxNewTokens must be 1 or more, not ${maxNewTokens}`],
    [temperature >= 0 && temperature < Infinity, `temperature must be 0 or more, not ${temperature}`],
    [Number.isInteger(topK) && topK >= 0, `topK must be 0 (off) or more, not ${topK}`],
    [topP > 0 && topP <= 1, `topP must be above 0 and at most 1, not ${topP}`],
    [minP >= 0 && minP <= 1, `minP must be 0 to 1, not ${minP}`],
    [repetitionPenalty > 0 && repetitionPenalty < Infinity, `repetitionPenalty must be above 0, not ${repetitionPenalty}`],
    [seed === null || (Number.isSafeInteger(seed) && seed >= 0), `seed must be 0 or more, not ${seed}`],
    [
      Array.isArray(stop) && stop.every((text) => typeof text === "string" && text && text.isWellFormed()),
      "stop must be a list of texts, none of them empty or with half of a surrogate pair",
    ],
  ]) {
    if (!isValid) throw new ConfigError("Invalid sampling options.", `${why}.`, "Correct the option and try again.");
  }
  return sampling;
}

/** Chooses the tokens of one answer. */
export class Sampler {
  /**
   * @param {Sampling} sampling
   * @param {number[]} context tokens before the answer, for the repetition penalty
   * @param {Set<number>} ids tokens that may be chosen; models often have more logits than tokens
   */
  constructor(sampling, context, ids) {
    this._sampling = sampling;
    this._random = new Random(sampling.seed);
    this._seen = new Set(context);
    this._ids = ids;
  }

  /**
   * Return the next token.
   *
   * @param {Float32Array} logits [V]
   * @returns {number} its id
   * @throws {DeltaMemError} the logit of a valid token is NaN or infinity, or those of all are minus infinity
   */
  pick(logits) {
    const scores = new Float64Array(logits.length).fill(-Infinity);
    let largest = -Infinity;
    for (const id of this._ids) {
      if (id >= logits.length) continue;
      scores[id] = logits[id];
      largest = Number.isNaN(scores[id]) ? NaN : Math.max(largest, scores[id]);
    }
    if (!Number.isFinite(largest)) throw notFiniteError();
    this._applyRepetitionPenalty(scores);
    const token = this._sampling.temperature === 0 ? argmax(scores) : this._drawToken(probabilities(scores, this._sampling));
    this._seen.add(token);
    return token;
  }

  _applyRepetitionPenalty(scores) {
    const penalty = this._sampling.repetitionPenalty;
    if (penalty === 1) return;
    for (const id of this._seen) {
      if (id >= scores.length) continue;
      const score = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
      scores[id] = Math.min(score, Number.MAX_VALUE);
    }
  }

  // Draws like `Generator.choice` of NumPy with probabilities.
  _drawToken(chances) {
    const sums = cumulativeSum(chances);
    const target = this._random.next();
    return sums.findIndex((sum) => sum / sums.at(-1) > target);
  }
}

/**
 * Return the probabilities to draw from at a temperature above 0: [V], zero for excluded tokens.
 *
 * @param {Float64Array} logits [V], after the repetition penalty
 * @param {Sampling} sampling
 * @returns {Float64Array}
 */
function probabilities(logits, { temperature, topK, topP, minP }) {
  const largest = logits[argmax(logits)];
  const scores = logits.map((logit) => (logit - largest) / temperature);
  if (topK > 0 && topK < scores.length) {
    const least = scores.toSorted()[scores.length - topK];
    exclude(scores, (index) => scores[index] < least);
  }
  if (topP < 1) {
    const chances = softmax(scores);
    // In ascending order, as transformers does: the tail is cut off, and never the most likely token.
    const order = [...scores.keys()].sort((a, b) => scores[a] - scores[b] || a - b).slice(0, -1);
    let sum = 0;
    for (const index of order) if ((sum += chances[index]) <= 1 - topP) scores[index] = -Infinity;
  }
  if (minP > 0) {
    const chances = softmax(scores);
    const least = minP * chances[argmax(chances)];
    exclude(scores, (index) => chances[index] < least);
  }
  return softmax(scores);
}

const notFiniteError = () =>
  new DeltaMemError(
    "The model's logits contain NaN or infinity.",
    "The weights are damaged or overflow in half precision, or the memory belongs to another model.",
    "Try another dtype or an earlier memory.",
  );

function exclude(scores, isExcluded) {
  for (let index = 0; index < scores.length; index++) if (isExcluded(index)) scores[index] = -Infinity;
}

function argmax(values) {
  let best = 0;
  for (let index = 1; index < values.length; index++) if (values[index] > values[best]) best = index;
  return best;
}

function cumulativeSum(values) {
  let sum = 0;
  return values.map((value) => (sum += value));
}

function softmax(scores) {
  const largest = scores[argmax(scores)];
  const chances = scores.map((score) => Math.exp(score - largest));
  const sum = chances.reduce((total, chance) => total + chance, 0);
  return chances.map((chance) => chance / sum);
}
