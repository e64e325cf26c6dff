// The little of a browser that sae/widgets.js uses. Setting HTML throws: text is only ever text here.
class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], listeners: {}, attributes: {}, style: {}, own: "", value: "", checked: false });
    this.classList = { add: () => {} };
  }
  set innerHTML(_) {
    throw new Error("innerHTML");
  }
  set textContent(text) {
    this.own = text;
    this.children = [];
  }
  get textContent() {
    return this.own + this.children.map((child) => child.textContent).join("");
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  append(...children) {
    this.children.push(...children);
  }
  replaceChildren(...children) {
    this.own = "";
    this.children = children;
  }
  addEventListener(name, fn) {
    (this.listeners[name] ??= []).push(fn);
  }
  fire(name) {
    for (const fn of this.listeners[name] ?? []) fn({ preventDefault() {} });
  }
  all(found = []) {
    found.push(this);
    for (const child of this.children) child.all(found);
    return found;
  }
}

class Model {
  constructor(state) {
    Object.assign(this, { state, listeners: {}, saved: [] });
  }
  get(name) {
    return this.state[name];
  }
  set(name, value) {
    this.state[name] = value;
    for (const fn of this.listeners[`change:${name}`] ?? []) fn();
  }
  save_changes() {
    this.saved.push(structuredClone(this.state.request));
  }
  on(name, fn) {
    (this.listeners[name] ??= []).push(fn);
  }
  off(name, fn) {
    this.listeners[name] = this.listeners[name].filter((other) => other !== fn);
  }
}

globalThis.document = { createElement: (tag) => new Element(tag) };
export { Element, Model };
