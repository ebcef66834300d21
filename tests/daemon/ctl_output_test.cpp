// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "ctl/answer.h"
#include "ctl/output.h"
#include "ctl/plot.h"

namespace ds::ctl {
namespace {

TEST(OutputTest, AgesSizesCountsAndDurations) {
  EXPECT_EQ(age_text(-5), "0s");
  EXPECT_EQ(age_text(59'999), "59s");
  EXPECT_EQ(age_text(180'000), "3m");
  EXPECT_EQ(age_text(7'200'000), "2h");
  EXPECT_EQ(age_text(259'200'000), "3d");
  EXPECT_EQ(uptime_text(273600), "3d 4h");
  EXPECT_EQ(uptime_text(60), "1m");
  EXPECT_EQ(duration_text(0.084), "84ms");
  EXPECT_EQ(duration_text(0.9999), "1.0s");
  EXPECT_EQ(duration_text(2.14), "2.1s");
  EXPECT_EQ(duration_text(38.2), "38s");
  EXPECT_EQ(duration_text(190), "3m 10s");
  EXPECT_EQ(size_text(512), "512 B");
  EXPECT_EQ(size_text(2516582), "2.4 MiB");
  EXPECT_EQ(size_text(85e6), "81 MiB");
  EXPECT_EQ(count_text(0), "0");
  EXPECT_EQ(count_text(999), "999");
  EXPECT_EQ(count_text(48210), "48 210");
  EXPECT_EQ(count_text(-1234567), "-1 234 567");
}

TEST(OutputTest, NothingFromOutsideCanMoveTheCursor) {
  EXPECT_EQ(printable("a\x1b[31mb"), "a\xEF\xBF\xBD[31mb");
  EXPECT_EQ(printable("a\nb\tc"), "a b c");
  EXPECT_EQ(printable("a\nb\tc\r", true), "a\nb\tc ");
  EXPECT_EQ(printable("\xC2\x9B"), "\xEF\xBF\xBD") << "C1 control: CSI in one byte";
  EXPECT_EQ(printable("\xff\xc3"), "\xEF\xBF\xBD\xEF\xBF\xBD");
  EXPECT_EQ(printable("\xE2\x80\xAE"), "\xEF\xBF\xBD") << "right-to-left override";
  EXPECT_EQ(printable("Grüße 日本 🙂"), "Grüße 日本 🙂");
}

TEST(OutputTest, WidthsCountTerminalColumns) {
  EXPECT_EQ(display_width("Grüße"), 5u);
  EXPECT_EQ(display_width("日本"), 4u);
  EXPECT_EQ(display_width("e\xCC\x81"), 1u);
  EXPECT_EQ(shortened("Grüße aus", 6), "Grüße…");
  EXPECT_EQ(shortened("short", 5), "short");
  EXPECT_EQ(display_width(shortened("日本語の文", 6)), 5u);
}

TEST(OutputTest, TablesAlignAndEndWithoutSpaces) {
  Table table({"NAME", ">N", "NOTE"});
  table.row({"é", "1 000", "x"});
  table.row({"longer", "2", ""}, Colour::kGreen, 0);
  EXPECT_EQ(table.text(false),
            "NAME        N  NOTE\n"
            "é       1 000  x\n"
            "longer      2\n");
  EXPECT_NE(table.text(true).find("\033[32mlonger\033[0m"), std::string::npos);
}

TEST(OutputTest, DigsLeniently) {
  const Json document = {{"a", {{"b", 3}, {"s", "x\ny"}}}, {"n", nullptr}};
  EXPECT_EQ(integer_at(document, "a.b"), 3);
  EXPECT_EQ(text_at(document, "a.s"), "x y");
  EXPECT_EQ(text_at(document, "n"), "-");
  EXPECT_EQ(text_at(document, "a.b.c"), "-");
  EXPECT_EQ(number_at(document, "a.s"), std::nullopt);
  EXPECT_TRUE(list_at(document, "a").empty());
  EXPECT_EQ(age_at(Json{{"now_ms", 5000}}, Json{{"t", 2000}}, "t"), "3s");
}

TEST(OutputTest, FingerprintsNameTheirVersion) {
  EXPECT_EQ(version_of_fingerprint("ds-v41-9f3c2a1b"), "v41");
  EXPECT_EQ(version_of_fingerprint("ds-digits@v3-9f3c2a1b"), "digits@v3");
  EXPECT_EQ(version_of_fingerprint("fp_123"), "fp_123");
  EXPECT_EQ(version_of_fingerprint("ds-"), "ds-");
  EXPECT_EQ(version_of_fingerprint(""), "");
}

TEST(PlotTest, DrawsTheCurveInBraille) {
  double low = 0, high = 0;
  // Four falling values on one row of two cells: a staircase from the top left to the bottom right.
  EXPECT_THAT(braille_plot({4, 3, 2, 1}, 2, 1, low, high), testing::ElementsAre("⠑⢄"));
  EXPECT_EQ(low, 1);
  EXPECT_EQ(high, 4);
  EXPECT_THAT(braille_plot({5}, 2, 1, low, high), testing::ElementsAre("⠀⠐"));
  EXPECT_THAT(braille_plot({1, NAN, 2}, 1, 1, low, high), testing::ElementsAre("⠐"))
      << "only the newest two values fit, and one of them is a gap";
  EXPECT_THAT(braille_plot({}, 1, 2, low, high), testing::ElementsAre("⠀", "⠀"));
}

TEST(PlotTest, SteepFallsStayConnected) {
  double low = 0, high = 0;
  const auto lines = braille_plot({9, 0}, 1, 1, low, high);
  EXPECT_THAT(lines, testing::ElementsAre("⢱"));
}

}  // namespace
}  // namespace ds::ctl
