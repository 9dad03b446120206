"""The stages of a run, in order: text, fit (SFT, reward, foresight), reference, align, evaluate."""
