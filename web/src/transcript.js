// What was said in a conversation, as the chat template writes it and as tokens. An answer is never tokenised again. In
// rendered text a placeholder stands for each answer, so that the template's words around it can be told from it. As
// deltamem_tool/chat/transcript.py.

import { spansOf, tagsOf } from "./boundaries.js";
import { DataError, ExportError } from "./errors.js";
import { checkMessages } from "./template.js";

const MARK = "\ue000";
const placeholder = (number) => `${MARK}${number}${MARK}`; // private-use characters, so no template trims them

/**
 * @typedef {import("./template.js").Message} Message
 * @typedef {{ messages: Message[], answer: string, tokens: number[] }} Turn
 */

/** Never changed: every method returns a new one. */
export class Transcript {
  /**
   * @param {Message[]} system the system messages that it began with
   * @param {Turn[]} turns those whose tokens are in the context
   * @param {Turn[]} dropped earlier ones, which have left it
   * @param {string} rendered all text of the context up to the last answer, placeholders for the answers before
   */
  constructor(system = [], turns = [], dropped = [], rendered = "") {
    Object.assign(this, { system, turns, dropped, rendered });
  }

  /** Everything that was said, dropped turns too. */
  get messages() {
    const ofTurn = ({ messages, answer }) => [...messages, { role: "assistant", content: answer }];
    return [...this.system, ...[...this.dropped, ...this.turns].flatMap(ofTurn)];
  }

  /** `rendered` with the last answer. */
  get head() {
    return this.rendered + (this.turns.length ? placeholder(this.turns.length - 1) : "");
  }

  /**
   * With another turn, which has no answer yet; and the tokens that it adds.
   *
   * @param {import("./text.js").ChatText} text
   * @param {string | Message[]} content
   * @returns {{ transcript: Transcript, tokens: number[] }}
   * @throws {ExportError} the chat template refuses the messages, or does not write the last answer
   * @throws {DataError} there is nothing in them, or as in `ChatText.render`
   */
  begin(text, content) {
    const isPlain = typeof content === "string";
    let messages = isPlain ? [{ role: "user", content }] : content;
    checkMessages(messages);
    if (isPlain && !content) throw nothing("The prompt is empty.");
    if (messages.some((message) => message.content.includes(MARK))) {
      throw new DataError("The prompt holds the character U+E000.", "It stands for answers here.", "Leave it out.");
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
      if (!rendered.startsWith(this.head)) rendered = this.head + this._added(text, earlier, messages, rendered);
    }
    const tokens = text.encode(rendered.slice(this.head.length), !text.hasTemplate && !this.head);
    if (!tokens.length) throw nothing("The text has no tokens.");
    const turns = [...this.turns, { messages, answer: "", tokens: [] }];
    return { transcript: new Transcript(system, turns, this.dropped, rendered), tokens };
  }

  // What of `rendered`, which does not begin as the context does, comes after the last answer.
  _added(text, earlier, messages, rendered) {
    if (!this.turns.length || !text.template.continues([...earlier, ...messages], earlier.length - 1)) {
      throw new ExportError(
        "The chat template does not continue this conversation.",
        "It does not write the new messages after the last answer.",
        "Start a new conversation, from this one's memory if it should remember.",
      );
    }
    return rendered.split(placeholder(this.turns.length - 1)).at(-1);
  }

  /**
   * The tags of the tokens of `rendered` from the character `start` on, where a turn begins; and whether the segment
   * before ends where they begin, so that none of them ends it.
   *
   * @param {import("./sentences.js").Split | null} split where sentences are segments; null where messages are
   * @returns {{ tags: number[], ended: boolean }}
   * @throws {DataError} the chat template does not let the end of a message be told
   */
  tags(text, start, split) {
    const messages = [...this.system, ...withPlaceholders(this.turns.slice(0, -1)), ...this.turns.at(-1).messages];
    // As the template writes it now: the end is that of `rendered`, what comes before it may not be.
    const rendered = text.render(messages);
    start += rendered.length - this.rendered.length;
    const offsets = text.offsets(rendered.slice(start)).map(([first, last]) => [start + first, start + last]);
    const spans = spansOf(text.template, messages, rendered, split);
    const tags = tagsOf(rendered, offsets, spans.filter(({ end }) => end > start));
    return { tags, ended: spans.some(({ end, segment }) => end === start && segment) };
  }

  /** With the answer to the last turn. */
  answered(answer, tokens) {
    const turns = [...this.turns.slice(0, -1), { ...this.turns.at(-1), answer, tokens }];
    return new Transcript(this.system, turns, this.dropped, this.rendered);
  }

  /** Of the turns in the context the last `count` alone, rendered as if the conversation had begun with them. */
  keep(text, count) {
    const [gone, kept] = [this.turns.slice(0, this.turns.length - count), this.turns.slice(this.turns.length - count)];
    const dropped = [...this.dropped, ...gone];
    let shorter = new Transcript(this.system, [], dropped, kept.length ? "" : alone(text, this.system));
    for (const turn of kept) {
      const content = text.hasTemplate ? turn.messages : turn.messages[0].content;
      shorter = shorter.begin(text, content).transcript.answered(turn.answer, turn.tokens);
    }
    return shorter;
  }

  /**
   * All tokens of the context, the last answer's too.
   *
   * @throws {ExportError} the template does not write every answer once
   */
  tokens(text) {
    const tokens = [];
    let rest = this.head;
    for (const [number, turn] of this.turns.entries()) {
      const place = rest.indexOf(placeholder(number));
      if (place < 0) {
        throw new ExportError(
          "The chat template does not write every answer of this conversation.",
          `Answer ${number + 1} is not in what it renders.`,
          "Start a new conversation, from this one's memory.",
        );
      }
      tokens.push(...text.encode(rest.slice(0, place), !text.hasTemplate && number === 0), ...turn.tokens);
      rest = rest.slice(place + placeholder(number).length);
    }
    return [...tokens, ...text.encode(rest)];
  }
}

function withPlaceholders(turns) {
  const ofTurn = ({ messages }, number) => [...messages, { role: "assistant", content: placeholder(number) }];
  return turns.flatMap(ofTurn);
}

// The system messages' own text; empty where the template writes it with the first user message only.
function alone(text, system) {
  if (!system.length) return "";
  const { template } = text;
  const [written, followed] = [template.attempt(system), template.attempt([...system, { role: "user", content: placeholder(0) }])];
  return written !== null && followed?.startsWith(written) ? written : "";
}

const nothing = (why) => new ExportError("There is nothing to answer.", why, "Give it some text.");
