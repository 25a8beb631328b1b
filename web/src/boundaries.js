// Assigns the tokens of a chat to segments. A port of deltamem_tool/segments/boundaries.py, which explains the rules.

import { isBlank, trim, trimStart } from "./characters.js";
import { DataError } from "./errors.js";

export const [OUTSIDE, INSIDE, LAST] = [0, 1, 2];
const WITHOUT_TAGS = 'Or use granularity "token", which needs no boundaries.';

/**
 * Characters from the end of the span before this one up to `end`.
 *
 * @typedef {object} Span
 * @property {number} end
 * @property {boolean} belongs whether they belong to a segment
 * @property {string} segment the segment's name in errors, if it ends here
 */

/**
 * Split a rendering that ends with a generation prompt into spans, in order and without gaps.
 *
 * @param {import("./template.js").ChatTemplate} template
 * @param {import("./template.js").Message[]} messages
 * @param {string} text the rendering of the messages
 * @param {import("./sentences.js").Split | null} split splits a content into sentences; null keeps messages whole
 * @returns {Span[]}
 * @throws {DataError} the template does not show where a message ends
 */
export function spansOf(template, messages, text, split) {
  const body = template.render(messages);
  if (!text.startsWith(body)) {
    throw new DataError(
      `The chat template of ${template.name} renders the messages differently before a generation prompt.`,
      "",
      `Use another model. ${WITHOUT_TAGS}`,
    );
  }
  const bounds = boundsOf(template, messages, body);
  const spans = [{ end: bounds[0], belongs: false, segment: "" }];
  for (const [index, { role, content }] of messages.entries()) {
    const [start, end] = bounds.slice(index, index + 2);
    const name = nameOf(messages, index);
    if (role === "system") {
      spans.push({ end, belongs: false, segment: "" });
    } else if (split === null || isBlank(content)) {
      spans.push({ end, belongs: true, segment: name });
    } else {
      const starts = sentenceStarts(template, messages, index, body, start, end, split);
      for (const [number, first] of starts.entries()) {
        const following = starts[number + 1] ?? end;
        const words = trim(body.slice(first, following)).slice(0, 60);
        spans.push({ end: following, belongs: true, segment: `sentence "${words}" of ${name}` });
      }
    }
  }
  spans.push({ end: text.length, belongs: true, segment: "" }); // the generation prompt: a segment that stays open
  return spans;
}

// Where each message starts in `body`, and where the last one ends: one number more than messages.
function boundsOf(template, messages, body) {
  const first = messages[0].role === "system" ? null : template.preamble(messages[0], body);
  const bounds = [first ?? 0];
  for (let index = 1; index < messages.length; index++) {
    const bound = boundOf(template, messages, index, body);
    if (bound === null || bound < bounds.at(-1)) {
      throw new DataError(
        `The chat template of ${template.name} does not show where ${nameOf(messages, index - 1)} ends and ` +
          `${nameOf(messages, index)} starts.`,
        "It renders earlier messages differently when later ones follow, or not at all without them.",
        `Use a model whose template only appends messages. ${WITHOUT_TAGS}`,
      );
    }
    bounds.push(bound);
  }
  return [...bounds, body.length];
}

// Where message `index` starts and the one before it ends; null if the template does not show it.
function boundOf(template, messages, index, body) {
  const earlier = template.attempt(messages.slice(0, index));
  if (earlier !== null && body.startsWith(earlier)) return earlier.length;
  const message = messages[index];
  const found = template.content(messages, index, body);
  const header = found === null ? null : template.header(message, found.before);
  if (header !== null) return found.before.length - header.length;
  const isAfterSystem = messages.slice(0, index).every(({ role }) => role === "system");
  return isAfterSystem ? template.preamble(message, body) : null; // their text is within this message
}

// Where in `body` the sentences of message `index`, `body.slice(start, end)`, start.
function sentenceStarts(template, messages, index, body, start, end, split) {
  const { begin, said } = saidOf(template, messages, index, body, start, end);
  if (isBlank(said)) return [begin];
  const starts = [];
  let position = 0;
  for (const piece of split(said)) {
    const place = said.indexOf(piece, position);
    if (place < 0) {
      throw new DataError(`The split of ${nameOf(messages, index)} has a piece that is not in its text.`, "", WITHOUT_TAGS);
    }
    if (!isBlank(piece)) starts.push(begin + place);
    position = place + piece.length;
  }
  return starts;
}

// Where the content of message `index` begins, and the part of it that the template writes.
function saidOf(template, messages, index, body, start, end) {
  const found = template.content(messages, index, body);
  if (found !== null && body.endsWith(found.after)) {
    const [begin, stop] = [found.before.length, body.length - found.after.length];
    const isWithin = start <= begin && begin <= stop && stop <= end;
    const said = body.slice(begin, stop);
    if (isWithin && messages[index].content.includes(said)) return { begin, said };
  }
  throw new DataError(
    `The chat template of ${template.name} does not show where the content of ${nameOf(messages, index)} is.`,
    "The template changes the content, or what it writes around the content depends on it.",
    'Use an adapter of granularity "message".',
  );
}

/**
 * The tags of tokens with the character ranges `offsets`; byte-level tokens can share a character.
 *
 * @throws {DataError} a segment has no token of its own
 */
export function tagsOf(text, offsets, spans) {
  const owners = offsets.map(([start, end]) => spans.findIndex((span) => span.end > placeOf(text, start, end)));
  const tags = owners.map((owner) => (spans[owner].belongs ? INSIDE : OUTSIDE));
  for (const [index, { segment }] of spans.entries()) {
    if (!segment) continue;
    const last = owners.lastIndexOf(index);
    if (last < 0) {
      throw new DataError(
        `${segment[0].toUpperCase()}${segment.slice(1)} has no token of its own.`,
        "The template writes nothing for it, or its characters are in tokens of the text before or after it.",
        "Leave it out, or merge it with another.",
      );
    }
    tags[last] = LAST;
  }
  return tags;
}

// The position of the character that decides the segment of the token at `text[start:end]`.
function placeOf(text, start, end) {
  const characters = text.slice(start, end);
  return isBlank(characters) ? Math.min(start, text.length - 1) : end - trimStart(characters).length;
}

const nameOf = (messages, index) => `message ${index + 1} (${messages[index].role})`;
