// Runs before the page is painted, so that a chosen theme never flashes the other one first.
try {
  const theme = JSON.parse(localStorage.getItem("flux-nf4.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off, or holds nonsense: the system's theme it is.
}
