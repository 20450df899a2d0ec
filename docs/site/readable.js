// Tables, code and figures that scroll can be reached with the keyboard, and what Material leaves unnamed has a name.
const name = () => {
  document.querySelectorAll(".md-typeset__scrollwrap, .highlight code, p:has(> img)").forEach(box => (box.tabIndex = 0));
  document.querySelectorAll(".md-search").forEach(box => box.setAttribute("aria-label", "Search"));
  document.querySelectorAll(".md-code__nav").forEach((box, i) => box.setAttribute("aria-label", `Code ${i + 1}`));
};
new MutationObserver(name).observe(document, {childList: true, subtree: true});
