"""Live search: one's own photographs, or a data set's gallery, searched by an image and words.

photos.py stage.py       a folder of photographs, and its features as they change
gallery.py               the rows that are searched, and what their products are kept for
packed.py threads.py     the rows once more, for products of few vectors; work on all cores
candidates.py            of millions of rows, those that are worth ranking (faiss)
searcher.py              a query and a method's parameters -> ranked rows
choices.py               which methods and parameters there are to choose from
saved.py                 a live query as features that run_retrieval.py reads
opening.py               a folder or a data set -> Searcher
pictures.py              thumbnails, and images that a visitor brings
server.py                what the page asks for; page.html page.css page.js
"""
