// Nodes and their text.

/** An element with attributes and children; a string becomes a text node. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Appends strings and elements, neighbouring strings as one text node; returns the parent. */
export function append(parent, children) {
  let text = "";
  for (const child of children) {
    if (typeof child === "string") {
      text += child;
      continue;
    }
    if (text) parent.append(text);
    text = "";
    parent.append(child);
  }
  if (text) parent.append(text);
  return parent;
}

/** Makes it the text node's data. What it has of it already stays, for layout and for who has selected it. */
export function showText(node, text) {
  if (!text.startsWith(node.data)) node.data = text;
  else if (text.length > node.length) node.appendData(text.slice(node.length));
}
