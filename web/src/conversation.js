// A conversation: its turns, its context and its memory, as in deltamem_tool/chat/conversation.py and context_window.py.
// The context is what the model attends to: a KV cache that grows with every token. The memory has a fixed size and keeps
// a trace of what has left the context.

import { SegmentTag } from "./boundaries.js";
import { ConfigError } from "./errors.js";
import { AnswerStream, answerPrompt } from "./generation.js";
import { checkMemory, endSegment, memoryBytes, readMemory } from "./memory.js";
import { createSampling, Sampler } from "./sampling.js";
import { Transcript } from "./transcript.js";

const KEPT_AFTER_EVICTION = 0.5; // at most this share of the window, so that turns only leave once in a while
const ROOM_FOR_ANSWER = 0.25; // at most this share of the window; a longer answer ends where the window does

/**
 * The position in a conversation. It is never changed, so going back to an earlier one undoes a turn.
 *
 * @typedef {object} Place
 * @property {import("./model.js").Past | null} past null if it can be restored by truncating the next place's
 * @property {import("./memory.js").Memory | null} memory that of `past`, if the next place continues from this one
 * @property {Transcript} transcript
 * @property {number[]} tokens tokens in the past
 * @property {import("./generation.js").Token[]} pending tokens that are not fed yet
 * @property {boolean} foreign whether the open segment in the memory belongs to another conversation
 */

/** One conversation. Await each call before the next one. One model serves many conversations. */
export class Conversation {
  /**
   * @param {import("./model.js").WebModel} model
   * @param {object} [options]
   * @param {import("./memory.js").Memory} [options.memory] memory to start from; empty by default
   * @param {boolean} [options.write] whether the tokens of this conversation write into the memory
   * @param {number | null} [options.window] maximum number of tokens in the context; by default as many as the model
   *   supports. If an answer might not fit, the oldest turns leave the context, and what they wrote stays in the memory.
   * @throws {MemoryStateError} the memory belongs to another adapter, or does not fit
   * @throws {ConfigError} the window is too small, or larger than the model supports; or the adapter writes by segments,
   *   which needs a chat template that the model lacks
   */
  constructor(model, { memory = model.emptyMemory(), write = true, window = model.maxLength } = {}) {
    checkWindow(model, window);
    if (model.memoryShape.width && !model.text.hasTemplate) {
      throw new ConfigError(
        `This adapter writes by ${model.mechanism.granularity}, which needs a chat template.`,
        "The model has no chat template.",
        "Use a chat model, or an adapter that writes every token.",
      );
    }
    checkMemory(memory, model.memoryShape, model.adapter);
    Object.assign(this, { model, write, window });
    this._place = initialPlace(model, memory);
    this._before = []; // the place before each turn and before each change of memory
    this._busy = false;
  }

  /**
   * How much of the conversation is in the context.
   *
   * @returns {{ tokens: number, window: number | null, messages: number, dropped: number }} number of tokens in the
   *   context; their maximum, null for no limit; number of messages in the context, and of those that have left it
   */
  get context() {
    const { transcript, tokens, pending } = this._place;
    const countMessages = (turns) => turns.reduce((sum, { messages }) => sum + messages.length + 1, 0);
    return {
      tokens: tokens.length + pending.length,
      window: this.window,
      messages: transcript.system.length + countMessages(transcript.turns),
      dropped: countMessages(transcript.dropped),
    };
  }

  /**
   * All messages since the start or the last `forget`, including those that have left the context.
   *
   * @returns {import("./template.js").Message[]}
   */
  get messages() {
    return this._place.transcript.messages;
  }

  /** Whether there is something to undo. */
  get canUndo() {
    return this._before.length > 0;
  }

  /**
   * Return a copy of the memory.
   *
   * @returns {Promise<import("./memory.js").Memory>}
   */
  memory() {
    return this.model.memory(this._place.past);
  }

  /**
   * Return the memory as the bytes of a memory file, which every runtime can load.
   *
   * @returns {Promise<Uint8Array>}
   * @throws {MemoryStateError} the memory contains NaN or infinity
   */
  async memoryBytes() {
    return memoryBytes(await this.memory());
  }

  /**
   * Replace the memory. The context stays as it is, and `undo` restores the former memory.
   *
   * @param {import("./memory.js").Memory | ArrayBuffer | Uint8Array} memory a memory, or the bytes of a memory file
   * @throws {MemoryStateError} the memory is damaged or does not fit; nothing has changed
   */
  setMemory(memory) {
    return this._runExclusive(async () => {
      if (memory instanceof ArrayBuffer || memory instanceof Uint8Array) memory = readMemory(memory);
      checkMemory(memory, this.model.memoryShape, this.model.adapter);
      const former = await this._earlier(this._place);
      this._before = [...this._before, former];
      this._place = { ...this._place, past: this.model.withMemory(this._place.past, memory), foreign: true };
    });
  }

  /** Reset the memory to zeros and empty the context. This cannot be undone. */
  forget() {
    return this._runExclusive(async () => {
      this._place = initialPlace(this.model, this.model.emptyMemory());
      this._before = [];
    });
  }

  /**
   * Undo the last turn or the last change of memory, and restore memory, context and messages from before it. Further
   * calls undo earlier turns, but none from before the second-to-last time that turns left the context.
   *
   * @returns {Promise<boolean>} false if there is nothing to undo
   */
  undo() {
    return this._runExclusive(async () => {
      if (!this._before.length) return false;
      const place = this._before.at(-1);
      const { past, memory, tokens } = place;
      if (memory === null) {
        this._place = place;
      } else {
        const shorter = past ?? (await this.model.take(this._place.past, tokens.length));
        this._place = { ...place, past: this.model.withMemory(shorter, memory), memory: null };
      }
      this._before = this._before.slice(0, -1);
      return true;
    });
  }

  /**
   * Add messages to the conversation and generate an answer.
   *
   * @param {string | import("./template.js").Message[]} content new messages, or a string: one user message, or plain
   *   text if the model has no chat template
   * @param {Partial<import("./sampling.js").Sampling>} [sampling]
   * @param {object} [options]
   * @param {(piece: string) => void} [options.onText] called with each piece of text as soon as it is complete
   * @param {AbortSignal} [options.signal] ends the answer; the conversation keeps the text generated so far
   * @returns {Promise<import("./generation.js").Answer>}
   * @throws {DeltaMemError} the prompt is longer than the window, or the chat template rejects the messages; whatever is
   *   thrown, nothing has changed
   */
  generate(content, sampling = {}, { onText = () => {}, signal } = {}) {
    return this._runExclusive(async (pasts) => {
      const { model } = this;
      const options = createSampling(sampling);
      const start = await this._makeRoom(content, options);
      pasts.push(start.past);
      const { transcript, tokens } = start.transcript.begin(model.text, content);
      const { past, prompt } = await this._markTokens(start, transcript, tokens);
      const length = start.tokens.length;
      const limit = Math.min(options.maxNewTokens, (this.window ?? Infinity) - length - prompt.length);
      const context = [...start.tokens, ...prompt.map(({ id }) => id)];
      const turn = { past, length, prompt, answerWrites: this.write, limit };
      const sampler = new Sampler(options, context, model.ids);
      const stream = new AnswerStream(model.text, options.stop, onText);
      const result = await answerPrompt(model, turn, sampler, stream, signal);
      await this._commit(start, {
        past: result.past,
        memory: null,
        transcript: transcript.withAnswer(result.answer.text, result.answerTokens),
        tokens: [...start.tokens, ...result.tokens.map(({ id }) => id)],
        pending: result.pending,
        foreign: false,
      });
      return result.answer;
    });
  }

  // The pasts of all places that are kept.
  get _pasts() {
    return [this._place, ...this._before].map(({ past }) => past).filter((past) => past !== null);
  }

  // Continues at `place`, which follows a turn that began at `start`. The place before the turn is kept for `undo`.
  async _commit(start, place) {
    if (start === this._place) {
      this._before = [...this._before, await this._earlier(start)];
    } else {
      // Turns have left the context: keep the place before with its whole context. These are large, so keep only one.
      const whole = this._before.findLastIndex(({ memory }) => memory === null);
      this._before = [...this._before.slice(whole + 1), this._place];
    }
    this._place = place;
  }

  // Returns the part of `place` that is kept when the next one continues from it.
  async _earlier(place) {
    const past = this.model.takesBack ? null : place.past; // a hybrid's past cannot be restored by truncating
    return { ...place, past, memory: await this.model.memory(place.past) };
  }

  // Returns the past to start from, and the tokens to feed. The last answer's segment ends with the last token that the
  // template writes for its message. An open segment of another conversation ends before anything is fed.
  async _markTokens(start, transcript, tokens) {
    const { model, write } = this;
    if (!write || !model.memoryShape.width) {
      return { past: start.past, prompt: [...start.pending, ...tokens.map((id) => ({ id, writes: write, ends: false }))] };
    }
    const { tags, ended } = transcript.tags(model.text, start.transcript.head.length, model.split);
    const pending = [...start.pending];
    const past = start.foreign || (ended && !pending.length) ? await this._closeSegment(start.past) : start.past;
    if (ended && pending.length) pending.push({ ...pending.pop(), ends: true });
    const tagged = tokens.map((id, index) => ({
      id,
      writes: tags[index] !== SegmentTag.OUTSIDE,
      ends: tags[index] === SegmentTag.LAST,
    }));
    return { past, prompt: [...pending, ...tagged] };
  }

  // Returns the current place, without its oldest turns if the window is too small for the prompt and an answer. The turns
  // that stay are fed again from the current memory, without writing.
  async _makeRoom(content, { maxNewTokens }) {
    const { window } = this;
    const place = this._place;
    if (window === null) return place;
    const { text } = this.model;
    const room = Math.max(1, Math.min(maxNewTokens, Math.floor(window * ROOM_FOR_ANSWER)));
    const countNew = (transcript) => transcript.begin(text, content).tokens.length;
    if (place.tokens.length + place.pending.length + countNew(place.transcript) + room <= window) return place;
    for (let count = place.transcript.turns.length - 1; count >= 0; count--) {
      const transcript = place.transcript.keep(text, count);
      const tokens = transcript.tokens(text);
      const fits = tokens.length <= window * KEPT_AFTER_EVICTION && tokens.length + countNew(transcript) + room <= window;
      if (fits) return this._evict(transcript, tokens);
    }
    const transcript = place.transcript.keep(text, 0);
    const tokens = transcript.tokens(text);
    const length = tokens.length + countNew(transcript);
    if (length >= window) {
      throw new ConfigError(
        `The prompt is longer than the window of ${window} tokens.`,
        `With the system message it has ${length}, and the answer needs at least one.`,
        "Shorten it, or use a larger window.",
      );
    }
    return place.tokens.length || place.pending.length ? this._evict(transcript, tokens) : place;
  }

  // Returns a place with a new context: `tokens`, fed from the current memory without writing.
  async _evict(transcript, tokens) {
    const { model } = this;
    const place = this._place;
    let { past } = place;
    if (place.foreign && this.write && model.memoryShape.width) past = await this._closeSegment(past);
    // Without this, the pending tokens would never reach the memory.
    if (place.pending.length) past = (await model.step(past, place.tokens.length, place.pending)).past;
    const memory = await model.memory(past);
    model.release([past], this._pasts);
    past = model.start(memory);
    const readOnly = tokens.map((id) => ({ id, writes: false, ends: false }));
    if (readOnly.length) past = (await model.step(past, 0, readOnly)).past;
    // If no turn stays, none of the tokens fed later can end the last turn's segment.
    return { past, memory: null, transcript, tokens, pending: [], foreign: !transcript.turns.length };
  }

  // Returns `past` after the open segment of its memory is written.
  async _closeSegment(past) {
    return this.model.withMemory(past, endSegment(await this.model.memory(past), this.model.mechanism));
  }

  // Runs `action`, unless another call is still running. Afterwards, releases the pasts that are no longer kept: those
  // before, and those that `action` adds to the list that it is called with.
  async _runExclusive(action) {
    if (this._busy) {
      throw new ConfigError("This conversation is busy.", "Another call has not finished.", "Await that call first.");
    }
    this._busy = true;
    const pasts = this._pasts;
    try {
      return await action(pasts);
    } finally {
      this.model.release(pasts, this._pasts);
      this._busy = false;
    }
  }
}

const initialPlace = (model, memory) => ({
  past: model.start(memory),
  memory: null,
  transcript: new Transcript(),
  tokens: [],
  pending: [],
  foreign: true,
});

function checkWindow({ maxLength }, window) {
  if (window === null) return;
  const isLarge = maxLength !== null && window > maxLength;
  if (Number.isInteger(window) && window >= 2 && !isLarge) return;
  const why = isLarge ? `This model supports at most ${maxLength}.` : "A prompt and an answer need at least two.";
  const next = `Choose a ${isLarge ? "smaller" : "larger"} one.`;
  throw new ConfigError(`A window of ${window} tokens is too ${isLarge ? "large" : "small"}.`, why, next);
}
