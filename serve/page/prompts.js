// Tokens in prompts, by the rules of cat_cluster/data/concepts.py.

/** The prompt without any occurrence of the token as a whole word; one following comma and spaces go with each. */
export function removeToken(prompt, token) {
  const folded = token.toLowerCase();
  return prompt.replace(/([^\s,]+)\s*(?:,\s*)?/g, (all, word) => (word.toLowerCase() === folded ? "" : all));
}

export const removeTokens = (prompt, tokens) => tokens.reduce(removeToken, prompt).trim();

export const words = (prompt) => prompt.split(/[\s,]+/).filter(Boolean);

/** The tokens that occur in the prompt as whole words. */
export function tokensIn(prompt, tokens) {
  const found = new Set(words(prompt).map((word) => word.toLowerCase()));
  return tokens.filter((token) => found.has(token.toLowerCase()));
}

/** The prompt in pieces `{text, token}`, to mark the tokens. */
export function pieces(prompt, tokens) {
  const folded = new Set(tokens.map((token) => token.toLowerCase()));
  return prompt
    .split(/([\s,]+)/)
    .filter(Boolean)
    .map((text) => ({ text, token: folded.has(text.toLowerCase()) }));
}

// The places that cat-cluster evaluates on (cat_cluster/evaluation/prompts.py): Pocket-SD's world, and any other base.
const POCKET = ["in snow", "on grass", "on sand", "at night", "at sunset", "on a table"];
const GENERAL = ["in the snow", "on a wooden table", "on a sandy beach", "in a forest", "in front of a brick wall"];

const placesOf = (baseName) => (baseName === "pocket" ? POCKET : GENERAL);
const named = ({ token, class_noun: noun }) => (noun ? `${token} ${noun}` : token);

/** Example prompts of an adapter: `[{label, prompt}]`; the first is the one to begin with. */
export function examples(concepts, baseName) {
  const places = placesOf(baseName);
  const used = concepts.length > 1 ? places.slice(0, Math.max(1, Math.floor(6 / concepts.length))) : places;
  return used.flatMap((place) =>
    concepts.map((concept) => {
      const subject = named(concept);
      const label = concepts.length > 1 ? `${subject} ${place}` : place;
      return { label, prompt: `a picture of a ${subject} ${place}` };
    }),
  );
}

/** The same of several adapters, with the first concept of each in every prompt. */
export function examplesTogether(adapters, baseName) {
  const subjects = [
    ...new Set(adapters.filter(({ concepts }) => concepts.length).map((one) => named(one.concepts[0]))),
  ];
  const all = subjects.map((subject) => `a ${subject}`).join(" and ");
  return placesOf(baseName).map((place) => ({ label: place, prompt: `a picture of ${all} ${place}` }));
}
