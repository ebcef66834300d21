# Writes OUT, the bytes of the templates as C++: the example plugins (so a template is code that is built
# and tested) and the two files beside this one.
set(kinds encoder attention quantizer learner curriculum retriever tool quantizer)
set(languages c++ c++ c++ c++ c++ c++ c++ c)
set(sources patch_mean.cpp sliding_window.cpp row_int8.cpp hardest_first.cpp shortest_first.cpp token_overlap.cpp
            line_length.cpp block_int4.c)

function(ds_embed_templates out)
  set(examples ${CMAKE_SOURCE_DIR}/examples/plugins)
  set(here ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  set(text "// From examples/plugins and daemon/ctl/plugin_template by embed.cmake.\n#include \"ctl/plugin_new.h\"\n\n")
  string(APPEND text "namespace ds::ctl {\nconst PluginTemplates& plugin_templates() {\n"
                     "  static const PluginTemplates all{\n")
  foreach(file CMakeLists.txt.in README.md.in)
    file(READ ${here}/${file} content)
    string(APPEND text "R\"DRIFTSTONE(${content})DRIFTSTONE\",\n")
    list(APPEND read ${here}/${file})
  endforeach()
  string(APPEND text "{\n")
  foreach(kind language source IN ZIP_LISTS kinds languages sources)
    file(READ ${examples}/${source} content)
    string(APPEND text "{\"${kind}\", \"${language}\", \"${source}\", R\"DRIFTSTONE(${content})DRIFTSTONE\"},\n")
    list(APPEND read ${examples}/${source})
  endforeach()
  string(APPEND text "}};\n  return all;\n}\n}  // namespace ds::ctl\n")
  file(WRITE ${out}.new "${text}")
  configure_file(${out}.new ${out} COPYONLY)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${read})
endfunction()
