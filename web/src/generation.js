// Answers token by token, as in deltamem_tool/chat/generation.py.

import { TextStream } from "./text.js";

/** Why an answer ended. */
export const [STOP_TOKEN, STOP_STRING, LENGTH, INTERRUPTED] = ["stop token", "stop string", "length", "interrupted"];

/**
 * A token, whether it writes or belongs to a segment, and whether it ends one.
 *
 * @typedef {{ id: number, writes: boolean, ends: boolean }} Token
 *
 * @typedef {object} Answer
 * @property {string} text without what ended it
 * @property {number[]} tokens as generated, a stop token or the last token of a stop string included
 * @property {"stop token" | "stop string" | "length" | "interrupted"} why it ended
 */

/** The text of an answer as it grows; what may become a stop string is held back. */
export class AnswerStream {
  /**
   * @param {import("./text.js").ChatText} text
   * @param {string[]} stop texts that end the answer before them
   * @param {(piece: string) => void} onText
   */
  constructor(text, stop, onText) {
    this._stream = new TextStream(text);
    this._stop = stop;
    this._onText = onText;
    this._held = "";
    this.text = ""; // what was given so far
  }

  /** Whether `token` completes a stop string, in which case nothing more is to come. */
  push(token) {
    return this._add(this._stream.push(token));
  }

  /** No token is to come: give what was held back. */
  end() {
    if (!this._add(this._stream.flush())) this._give(this._held);
  }

  _add(piece) {
    const text = this._held + piece;
    const starts = this._stop.map((stop) => text.indexOf(stop)).filter((start) => start >= 0);
    if (starts.length) {
      this._held = "";
      this._give(text.slice(0, Math.min(...starts)));
      return true;
    }
    let keep = 0;
    while (keep < text.length && !this._stop.some((stop) => stop.startsWith(text.slice(keep)))) keep++;
    this._held = text.slice(keep);
    this._give(text.slice(0, keep));
    return false;
  }

  _give(piece) {
    if (!piece) return;
    this.text += piece;
    this._onText(piece);
  }
}

/**
 * Feed a prompt and let the model answer.
 *
 * @param {import("./model.js").WebModel} model
 * @param {object} start
 * @param {import("./model.js").Past} start.past
 * @param {number} start.length tokens in it
 * @param {Token[]} start.prompt
 * @param {boolean} start.answerWrites
 * @param {number} start.limit the longest answer, in tokens
 * @param {import("./sampling.js").Sampler} sampler
 * @param {AnswerStream} stream
 * @param {AbortSignal} [signal] ends the answer; what was said until then stays
 * @returns {Promise<{ answer: Answer, past: import("./model.js").Past, fed: Token[], pending: Token[] }>} `fed`, and
 *   `pending`: of prompt and answer, what is in the past, and what is still to be fed
 * @throws it was interrupted before the prompt was in, or a call failed
 */
export async function answerPrompt(model, { past, length, prompt, answerWrites, limit }, sampler, stream, signal) {
  const tokens = [...prompt];
  const start = past;
  let fed = 0;
  let last = []; // a token that ended the answer and is not fed
  let why = INTERRUPTED;
  try {
    while (why === INTERRUPTED) {
      if (fed === 0) signal?.throwIfAborted();
      const stepped = await model.step(past, length + fed, tokens.slice(fed));
      if (past !== start) model.release(past);
      [past, fed] = [stepped.past, tokens.length];
      const id = sampler.pick(stepped.logits);
      if (model.stopTokens.has(id)) {
        [last, why] = [[id], STOP_TOKEN];
        stream.end();
      } else if (stream.push(id)) {
        [last, why] = [[id], STOP_STRING];
      } else {
        tokens.push({ id, writes: answerWrites, ends: false });
        if (tokens.length - prompt.length >= limit) {
          stream.end();
          why = LENGTH;
        }
      }
      await turnOfLoop();
      if (signal?.aborted && why === INTERRUPTED) {
        stream.end();
        break;
      }
    }
  } catch (error) {
    if (past !== start) model.release(past);
    throw error;
  }
  const answered = tokens.slice(prompt.length).map(({ id }) => id);
  const answer = { text: stream.text, tokens: [...answered, ...last], why };
  return { answer, answered, past, fed: tokens.slice(0, fed), pending: tokens.slice(fed) };
}

// Lets a page draw, and messages in: a call of the model takes the whole thread. (A timer would wait 4 ms.)
function turnOfLoop() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
