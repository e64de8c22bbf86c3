// The slider's place is a CSS variable of its stage; the cards' order is the only other thing that moves.
document.querySelectorAll(".stage input").forEach((range) => {
  range.addEventListener("input", () => range.parentElement.style.setProperty("--x", range.value + "%"));
});
const order = document.getElementById("order");
order?.addEventListener("change", () => {
  const cards = [...document.querySelectorAll(".card")];
  cards.sort((a, b) => a.dataset[order.value] - b.dataset[order.value]);
  cards[0].parentElement.append(...cards);
});
