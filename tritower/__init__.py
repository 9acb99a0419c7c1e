"""Find similar products by text, pictures and attributes: trained towers, one embedding, a vector index.

The folders of the checkout are packages of this one name: `towers/` is `tritower.towers`.
"""
