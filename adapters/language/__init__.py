"""Language models that read pictures: how tokens get in, leave, and what the layers behind a cut are handed."""
