// The slider's place is a CSS variable of its stage. Cards can be put in another order, and the many are folded away.
document.querySelectorAll(".stage input").forEach((range) => {
  range.addEventListener("input", () => range.parentElement.style.setProperty("--x", range.value + "%"));
});
const order = document.getElementById("order");
order?.addEventListener("change", () => {
  const cards = [...document.querySelectorAll(".card")];
  cards.sort((a, b) => a.dataset[order.value] - b.dataset[order.value]);
  cards[0].parentElement.append(...cards);
});
const cards = document.querySelector(".cards");
const more = document.getElementById("more");
if (cards.children.length > 8) {
  cards.classList.add("folded");
  more.hidden = false;
  more.addEventListener("click", () => {
    cards.classList.remove("folded");
    more.hidden = true;
  });
}
