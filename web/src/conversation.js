// Turns of one conversation, its context and its memory, as in deltamem_tool/chat/conversation.py and context_window.py.
// The context is what the model attends to and grows by every token; the memory is of a fixed size and keeps a trace of
// what has left the context.

import { LAST, OUTSIDE } from "./boundaries.js";
import { ConfigError } from "./errors.js";
import { AnswerStream, answerPrompt } from "./generation.js";
import { checkMemory, endSegment, memoryBytes, readMemory } from "./memory.js";
import { Sampler, samplingOf } from "./sampling.js";
import { Transcript } from "./transcript.js";

const KEPT_AFTER_EVICTION = 0.5; // of the window, at most: so that turns have to leave only once in a while
const ROOM_FOR_ANSWER = 0.25; // of the window, at most: an answer may be longer, and then ends where the window does

/**
 * Where a conversation is. Never changed, so that going back to one undoes a turn.
 *
 * @typedef {object} Place
 * @property {import("./model.js").Past | null} past null where it can be had again, by cutting the next place's
 * @property {import("./memory.js").Memory | null} memory of `past`, where the next place goes on from this one
 * @property {Transcript} transcript
 * @property {number[]} tokens those in the past
 * @property {import("./generation.js").Token[]} pending those still to be fed
 * @property {boolean} foreign whether the open segment in the memory is another conversation's
 */

/** One conversation. Its methods are called one after the other; the model is for many. */
export class Conversation {
  /**
   * @param {import("./model.js").WebModel} model
   * @param {object} [options]
   * @param {import("./memory.js").Memory} [options.memory] what it remembers from before
   * @param {boolean} [options.write] whether its tokens write
   * @param {number | null} [options.window] the most tokens that its context may hold; by default as many as the model
   *   can. When an answer might not fit, the oldest turns leave the context, and what they wrote stays in the memory.
   * @throws {MemoryStateError} the memory is another adapter's, or does not fit
   * @throws {ConfigError} the window is too small, or larger than the model's room; or the adapter needs a chat template
   */
  constructor(model, { memory = model.emptyMemory(), write = true, window = model.maxLength } = {}) {
    checkWindow(model, window);
    if (model.memoryShape.width && !model.text.hasTemplate) {
      throw new ConfigError(
        `This adapter writes by ${model.mechanism.granularity}, and the model cannot tell where one ends.`,
        "The model has no chat template.",
        "Use a chat model, or an adapter that writes every token.",
      );
    }
    checkMemory(memory, model.memoryShape, model.adapter);
    Object.assign(this, { model, write, window });
    this._place = beginning(model, memory);
    this._before = []; // each turn, and each memory that was put in place
    this._busy = false;
  }

  /** How much of the conversation the model attends to: tokens and messages, and messages that have left it. */
  get context() {
    const { transcript, tokens, pending } = this._place;
    const count = (turns) => turns.reduce((sum, { messages }) => sum + messages.length + 1, 0);
    const messages = transcript.system.length + count(transcript.turns);
    return { tokens: tokens.length + pending.length, window: this.window, messages, dropped: count(transcript.dropped) };
  }

  /** Everything that was said since it began or was told to forget, whether it is still in the context or not. */
  get messages() {
    return this._place.transcript.messages;
  }

  /** Whether there is something to undo. */
  get canUndo() {
    return this._before.length > 0;
  }

  /** @returns {Promise<import("./memory.js").Memory>} */
  memory() {
    return this.model.memory(this._place.past);
  }

  /** What a memory file contains, which every runtime loads. */
  async memoryBytes() {
    return memoryBytes(await this.memory());
  }

  /**
   * Put another memory in place of this one; the context stays, and `undo` takes it back.
   *
   * @param {import("./memory.js").Memory | ArrayBuffer | Uint8Array} memory or a memory file's content
   * @throws {MemoryStateError} it is damaged or does not fit; nothing has changed then
   */
  setMemory(memory) {
    return this._alone(async () => {
      if (memory instanceof ArrayBuffer || memory instanceof Uint8Array) memory = readMemory(memory);
      checkMemory(memory, this.model.memoryShape, this.model.adapter);
      const former = await this._earlier(this._place);
      this._before = [...this._before, former];
      this._place = { ...this._place, past: this.model.withMemory(this._place.past, memory), foreign: true };
    });
  }

  /** Start from nothing: the memory zeros, the context empty. It cannot be undone. */
  forget() {
    return this._alone(async () => {
      this._place = beginning(this.model, this.model.emptyMemory());
      this._before = [];
    });
  }

  /**
   * Take back the last turn or the memory loaded since: memory, context and messages are as they were before. So can
   * those before be, but none from before the last but one time that turns left the context.
   *
   * @returns {Promise<boolean>} false if there is none
   */
  undo() {
    return this._alone(async () => {
      if (!this._before.length) return false;
      const place = this._before.at(-1);
      const { past, memory, tokens } = place;
      if (memory === null) {
        this._place = place;
      } else {
        const cut = past ?? (await this.model.take(this._place.past, tokens.length));
        this._place = { ...place, past: this.model.withMemory(cut, memory), memory: null };
      }
      this._before = this._before.slice(0, -1);
      return true;
    });
  }

  /**
   * Go on with the conversation and answer.
   *
   * @param {string | import("./template.js").Message[]} content new messages, or one user message (plain text where the
   *   model has no chat template)
   * @param {Partial<import("./sampling.js").Sampling>} [sampling]
   * @param {object} [options]
   * @param {(piece: string) => void} [options.onText] is called with each piece of text as it is completed
   * @param {AbortSignal} [options.signal] ends the answer; what was said until then stays
   * @returns {Promise<import("./generation.js").Answer>}
   * @throws {DeltaMemError} the prompt is longer than the window, or the chat template refuses the messages; whatever is
   *   thrown, nothing has changed
   */
  generate(content, sampling = {}, { onText = () => {}, signal } = {}) {
    return this._alone(async () => {
      const { model } = this;
      const options = samplingOf(sampling);
      const start = await this._withRoom(content, options);
      const { transcript, tokens } = start.transcript.begin(model.text, content);
      const { past, prompt } = await this._marked(start, transcript, tokens);
      const length = start.tokens.length;
      const limit = Math.min(options.maxNewTokens, (this.window ?? Infinity) - length - prompt.length);
      const context = [...start.tokens, ...prompt.map(({ id }) => id)];
      const turn = { past, length, prompt, answerWrites: this.write, limit };
      const sampler = new Sampler(options, context, model.ids);
      const stream = new AnswerStream(model.text, options.stop, onText);
      const row = await answerPrompt(model, turn, sampler, stream, signal);
      const after = {
        past: row.past,
        memory: null,
        transcript: transcript.answered(row.answer.text, row.answered),
        tokens: [...start.tokens, ...row.fed.map(({ id }) => id)],
        pending: row.pending,
        foreign: false,
      };
      await this._goOn(start, after);
      return row.answer;
    });
  }

  // The place after a turn that began at `start`; the one before it is kept for `undo`.
  async _goOn(start, after) {
    if (start === this._place) {
      this._before = [...this._before, await this._earlier(start)];
      if (this.model.takesBack) this.model.release(start.past, after.past);
    } else {
      // Turns have left the context: it is kept whole; of such, which are large, one is enough.
      const whole = this._before.findLastIndex(({ memory }) => memory === null);
      this._before = [...this._before.slice(whole + 1), this._place];
    }
    this._place = after;
  }

  // `place`, once there is a next one that goes on from it.
  async _earlier(place) {
    const past = this.model.takesBack ? null : place.past; // a hybrid's cannot be had by cutting
    return { ...place, past, memory: await this.model.memory(place.past) };
  }

  // The past to start from, and the tokens to feed. The last answer's segment ends with its message's last token, as the
  // template writes it; one that is another conversation's ends before anything is fed.
  async _marked(start, transcript, tokens) {
    const { model, write } = this;
    if (!write || !model.memoryShape.width) {
      return { past: start.past, prompt: [...start.pending, ...tokens.map((id) => ({ id, writes: write, ends: false }))] };
    }
    const { tags, ended } = transcript.tags(model.text, start.transcript.head.length, model.split);
    const pending = [...start.pending];
    const past = start.foreign || (ended && !pending.length) ? await this._closed(start.past) : start.past;
    if (ended && pending.length) pending.push({ ...pending.pop(), ends: true });
    const fed = tokens.map((id, place) => ({ id, writes: tags[place] !== OUTSIDE, ends: tags[place] === LAST }));
    return { past, prompt: [...pending, ...fed] };
  }

  // This place, without its oldest turns if the window is too small for the prompt and an answer. The turns that stay are
  // read again, without writing, from the memory as it is.
  async _withRoom(content, { maxNewTokens }) {
    const { window } = this;
    const place = this._place;
    if (window === null) return place;
    const { text } = this.model;
    const room = Math.max(1, Math.min(maxNewTokens, Math.floor(window * ROOM_FOR_ANSWER)));
    const added = place.transcript.begin(text, content).tokens.length;
    if (place.tokens.length + place.pending.length + added + room <= window) return place;
    for (let count = place.transcript.turns.length - 1; count >= 0; count--) {
      const kept = place.transcript.keep(text, count);
      const tokens = kept.tokens(text);
      const fresh = kept.begin(text, content).tokens.length;
      const fits = tokens.length <= window * KEPT_AFTER_EVICTION && tokens.length + fresh + room <= window;
      if (fits) return this._evicted(kept, tokens);
    }
    const kept = place.transcript.keep(text, 0);
    const tokens = kept.tokens(text);
    const length = tokens.length + kept.begin(text, content).tokens.length;
    if (length >= window) {
      throw new ConfigError(
        `The prompt is longer than the window of ${window} tokens.`,
        `With the system message it has ${length}, and the answer needs one at least.`,
        "Shorten it, or take a larger window.",
      );
    }
    return place.tokens.length || place.pending.length ? this._evicted(kept, tokens) : place;
  }

  // An empty context that has read `tokens`, and not written them, from the memory after all that was said.
  async _evicted(kept, tokens) {
    const { model } = this;
    const place = this._place;
    let { past } = place;
    if (place.foreign && this.write && model.memoryShape.width) past = await this._closed(past);
    if (place.pending.length) past = (await model.step(past, place.tokens.length, place.pending)).past; // or it leaves no trace
    past = model.start(await model.memory(past));
    const read = tokens.map((id) => ({ id, writes: false, ends: false }));
    if (read.length) past = (await model.step(past, 0, read)).past;
    // Where no turn stays, nothing that is fed can end the last one's segment.
    return { past, memory: null, transcript: kept, tokens, pending: [], foreign: !kept.turns.length };
  }

  // `past`, the open segment of whose memory is written.
  async _closed(past) {
    return this.model.withMemory(past, endSegment(await this.model.memory(past), this.model.mechanism));
  }

  async _alone(action) {
    if (this._busy) {
      throw new ConfigError("This conversation is busy.", "A call of it has not ended.", "Wait for it.");
    }
    this._busy = true;
    try {
      return await action();
    } finally {
      this._busy = false;
    }
  }
}

const beginning = (model, memory) => ({
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
  const why = isLarge ? `This model has room for ${maxLength}.` : "A prompt and an answer need two.";
  throw new ConfigError(`A window of ${window} tokens is too ${isLarge ? "large" : "small"}.`, why, "Choose another one.");
}
