// The messages of a conversation, as the chat template renders them and as tokens. Answers are never tokenised again. In
// rendered text, a placeholder stands for each answer, to tell the text of the template around it from the answer. As
// deltamem_tool/chat/transcript.py.

import { spansOf, tagsOf } from "./boundaries.js";
import { DataError, ExportError } from "./errors.js";
import { checkMessages } from "./template.js";

const MARK = "\ue000";
const placeholder = (number) => `${MARK}${number}${MARK}`; // private-use characters, so no template trims them

/**
 * @typedef {import("./template.js").Message} Message
 *
 * @typedef {object} Turn new messages and the answer to them
 * @property {Message[]} messages
 * @property {string} answer text of the answer
 * @property {number[]} tokens tokens of the answer in the context, without a stop token, which the template writes
 */

/** The messages of a conversation. It is never changed: every method returns a new one. */
export class Transcript {
  /**
   * @param {Message[]} system system messages at the beginning
   * @param {Turn[]} turns turns whose tokens are in the context
   * @param {Turn[]} dropped earlier turns, which have left the context
   * @param {string} rendered text of the context up to the last answer, with placeholders for the earlier answers
   */
  constructor(system = [], turns = [], dropped = [], rendered = "") {
    Object.assign(this, { system, turns, dropped, rendered });
  }

  /** All messages, including those of dropped turns. */
  get messages() {
    const turns = [...this.dropped, ...this.turns];
    return [...this.system, ...turns.flatMap(({ messages, answer }) => [...messages, { role: "assistant", content: answer }])];
  }

  /** `rendered` with the last answer. */
  get head() {
    return this.rendered + (this.turns.length ? placeholder(this.turns.length - 1) : "");
  }

  /**
   * Return the transcript with another turn, which has no answer yet, and the tokens that it adds.
   *
   * @param {import("./text.js").ChatText} text
   * @param {string | Message[]} content
   * @returns {{ transcript: Transcript, tokens: number[] }}
   * @throws {ExportError} the chat template rejects the messages or does not write the last answer, or the messages are empty
   * @throws {DataError} there are no messages, a message contains the placeholder, or as in `ChatText.render`
   */
  begin(text, content) {
    const isPlain = typeof content === "string";
    let messages = isPlain ? [{ role: "user", content }] : content;
    checkMessages(messages);
    if (isPlain && !content) throw emptyPromptError("The prompt is empty.");
    if (messages.some((message) => message.content.includes(MARK))) {
      throw new DataError(
        "The prompt contains the character U+E000.",
        "It is the placeholder for answers when a conversation is rendered, and has no meaning in any text.",
        "Leave it out.",
      );
    }
    let { system } = this;
    if (!this.turns.length && !system.length) {
      const count = Math.max(0, messages.findIndex(({ role }) => role !== "system"));
      [system, messages] = [messages.slice(0, count), messages.slice(count)];
    }
    let rendered;
    if (isPlain && !text.hasTemplate) {
      rendered = this.head + content;
    } else {
      const earlier = [...system, ...withPlaceholders(this.turns)];
      rendered = text.render([...earlier, ...messages]);
      if (!rendered.startsWith(this.head)) rendered = this.head + this._addedText(text, earlier, messages, rendered);
    }
    const tokens = text.encode(rendered.slice(this.head.length), !text.hasTemplate && !this.head);
    if (!tokens.length) throw emptyPromptError("The text has no tokens.");
    const turns = [...this.turns, { messages, answer: "", tokens: [] }];
    return { transcript: new Transcript(system, turns, this.dropped, rendered), tokens };
  }

  // The part of `rendered` after the last answer, if `rendered` does not begin like the context.
  _addedText(text, earlier, messages, rendered) {
    if (!this.turns.length || !text.template.continues([...earlier, ...messages], earlier.length - 1)) {
      throw new ExportError(
        "The chat template does not continue this conversation.",
        "It does not write the new messages after the last answer.",
        "Start a new conversation, with this one's memory if it should remember.",
      );
    }
    return rendered.split(placeholder(this.turns.length - 1)).at(-1);
  }

  /**
   * Tag the tokens of `rendered` from the character `start` on, where a turn begins.
   *
   * @param {import("./text.js").ChatText} text
   * @param {number} start
   * @param {import("./sentences.js").Split | null} split splits a content if segments are sentences; null if they are messages
   * @returns {{ tags: number[], ended: boolean }} `ended`: whether the previous segment ends where these tokens begin, so
   *   that none of them ends it
   * @throws {DataError} the chat template does not show where a message ends
   */
  tags(text, start, split) {
    const messages = [...this.system, ...withPlaceholders(this.turns.slice(0, -1)), ...this.turns.at(-1).messages];
    // The template may render earlier messages differently by now. Only the end is sure to be that of `this.rendered`.
    const rendered = text.render(messages);
    start += rendered.length - this.rendered.length;
    const offsets = text.offsets(rendered.slice(start)).map(([first, last]) => [start + first, start + last]);
    const spans = spansOf(text.template, messages, rendered, split);
    const tags = tagsOf(rendered, offsets, spans.filter(({ end }) => end > start));
    return { tags, ended: spans.some(({ end, segment }) => end === start && segment) };
  }

  /**
   * Return the transcript with the answer to the last turn.
   *
   * @param {string} answer
   * @param {number[]} tokens tokens of the answer in the context
   */
  withAnswer(answer, tokens) {
    const turns = [...this.turns.slice(0, -1), { ...this.turns.at(-1), answer, tokens }];
    return new Transcript(this.system, turns, this.dropped, this.rendered);
  }

  /** Keep only the last `count` turns of the context, rendered as if the conversation began with them. */
  keep(text, count) {
    const first = this.turns.length - count;
    const [droppedTurns, keptTurns] = [this.turns.slice(0, first), this.turns.slice(first)];
    const dropped = [...this.dropped, ...droppedTurns];
    let shorter = new Transcript(this.system, [], dropped, keptTurns.length ? "" : renderSystem(text, this.system));
    for (const turn of keptTurns) {
      const content = text.hasTemplate ? turn.messages : turn.messages[0].content;
      shorter = shorter.begin(text, content).transcript.withAnswer(turn.answer, turn.tokens);
    }
    return shorter;
  }

  /**
   * Return all tokens of the context, including those of the last answer.
   *
   * @param {import("./text.js").ChatText} text
   * @returns {number[]}
   * @throws {ExportError} the template does not write every answer
   */
  tokens(text) {
    const tokens = [];
    let rest = this.head;
    for (const [number, turn] of this.turns.entries()) {
      const position = rest.indexOf(placeholder(number));
      if (position < 0) {
        throw new ExportError(
          "The chat template does not write every answer of this conversation.",
          `Answer ${number + 1} is not in the rendered text.`,
          "Start a new conversation with this one's memory.",
        );
      }
      tokens.push(...text.encode(rest.slice(0, position), !text.hasTemplate && number === 0), ...turn.tokens);
      rest = rest.slice(position + placeholder(number).length);
    }
    return [...tokens, ...text.encode(rest)];
  }
}

function withPlaceholders(turns) {
  return turns.flatMap(({ messages }, number) => [...messages, { role: "assistant", content: placeholder(number) }]);
}

// The text of the system messages alone; empty if the template only writes it with the first user message.
function renderSystem(text, system) {
  if (!system.length) return "";
  const alone = text.template.tryRender(system);
  const followed = text.template.tryRender([...system, { role: "user", content: placeholder(0) }]);
  return alone !== null && followed?.startsWith(alone) ? alone : "";
}

const emptyPromptError = (why) => new ExportError("There is nothing to answer.", why, "Give it some text.");
