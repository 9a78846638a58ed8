// Small things that survive a reload. Where storage is switched off the page works without.
const PREFIX = "flux-nf4.";

export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Full or switched off: forgetting is all that happens.
  }
}
